"""`codebook serve` as a process: how it starts, what it refuses before it does, and how it ends."""

import os
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from benchmarks.faults import serve_hostile
from benchmarks.served import ServiceProcess
from codebook.cli import serve
from codebook.errors import CodebookError
from codebook.serving.limits import is_own_name
from codebook.serving.server import address, is_local, listen


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "other"], ["no engine 'other'", "use transformers"]),
        (["--limit", "queues=3"], ["no limit 'queues'", "body, images"]),
        (["--limit", "queue=-3"], ["the limit queue must be a positive integer, not '-3'"]),
        (["--limit", "queue"], ["the limit queue must be a positive integer, not ''"]),
        (["--allow-urls", "https://images.example/"], ["is no host"]),
        (["--dtype", "int8"], ["no dtype 'int8'"]),
        (["--device", "nowhere"], ["cannot use the device 'nowhere'"]),
        (["--method", "nothing"], ["nothing"]),
        (["--keep", "2"], ["keep"]),
        (["--host", "192.0.2.1"], ["cannot listen on 192.0.2.1, port 8000"]),
        (["--host", "a" * 64 + ".example"], ["port 8000: ", "choose another --host or --port"]),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(refused, monkeypatch, options, words):
    monkeypatch.setattr("codebook.models.loading.load", lambda *_: pytest.fail("a model was loaded"))
    refused("serve", "miniature", *options, words=words)


def test_a_port_that_is_taken_is_named(refused, monkeypatch):
    monkeypatch.setattr("codebook.models.loading.load", lambda *_: pytest.fail("a model was loaded"))
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        words = [f"cannot listen on 127.0.0.1, port {port}: Address already in use; choose another --host or --port"]
        refused("serve", "miniature", "--port", port, words=words)


def test_a_key_file_without_a_key(refused, tmp_path):
    (tmp_path / "key").write_text(" \n")
    refused("serve", "miniature", "--api-key-file", tmp_path / "key", words=["holds no key"])
    refused("serve", "miniature", "--api-key-file", tmp_path / "none", words=["none"])
    for unsendable in (b"one\ntwo", b"\xff\xfe", b"a\0b"):
        (tmp_path / "key").write_bytes(unsendable)
        refused("serve", "miniature", "--api-key-file", tmp_path / "key", words=["a key that no client can send"])


def test_without_a_model_any_number_of_codebooks_may_come_without_names():
    books, pruning = serve._checked_codebooks(["miniature", "eyes"], None, False)
    assert [*books] == ["miniature", "eyes"] and pruning == books["miniature"]
    with pytest.raises(CodebookError, match="prunes with one codebook, and 2 came without a name: write NAME=DIR"):
        serve._checked_codebooks(["miniature", "eyes", "third=miniature"], "miniature", False)
    assert serve._checked_codebooks(["other=eyes", "miniature"], "miniature", False)[1] == books["miniature"]


def test_arguments_are_checked_without_torch():
    code = (
        "import sys; from codebook import cli\n"
        "try: cli.main(['serve', 'miniature', '--limit', 'queue=0'])\n"
        "except SystemExit: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


def test_this_machine_alone_is_told_from_others():
    for host, local in (("127.0.0.1", True), ("127.0.0.2", True), ("localhost", True), ("0.0.0.0", False)):
        with listen(host, 0) as bound:
            assert is_local(bound) is local
            assert is_own_name(urlsplit(address(bound)).netloc.rpartition(":")[0]) is local


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_told_to_end_under_load_it_answers_what_it_accepted():
    limits = [word for name, value in serve_hostile.LIMITS.items() for word in ("--limit", f"{name}={value}")]
    with ServiceProcess("--keep", "0.2", *limits) as service:
        target = serve_hostile.make_target(service.url)
        # A request that is only half there when the service is told to end does not keep it.
        with socket.create_connection(target.place, timeout=60) as half:
            half.sendall(serve_hostile.request_head(1000) + b"{")
            code, ended, lost = serve_hostile.drain(service, target, clients=8, after=10)
        target.client.close()
    assert not lost and code == 0
    assert ended["answered"] >= 10 and ended["refused"] + ended["not connected"] + ended["closed"] == 8


def test_a_key_from_the_environment_or_a_file(monkeypatch, tmp_path):
    monkeypatch.delenv(serve.KEY, raising=False)
    assert serve._api_key(None) is None
    monkeypatch.setenv(serve.KEY, "secret")
    assert serve._api_key(None) == "secret"
    (tmp_path / "key").write_text("another\n")
    assert serve._api_key(tmp_path / "key") == "another"
