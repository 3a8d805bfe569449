"""Only regular files within limits are read and replaced, and every error is one line, at once."""

import json
import os
import signal
import stat
import time
from functools import partial

import pytest
import torch
from safetensors.torch import save

from codebook.errors import CodebookError
from codebook.inference.samples import read_samples
from codebook.pruning.plan import Plan
from codebook.store import files
from codebook.store.codebook import Codebook
from codebook.store.files import replacing, write_files
from codebook.store.journal import Journal
from codebook.store.parsing import parse_tensors
from codebook.store.pictures import read_image
from codebook.store.reading import cannot_read, is_file, read_json, read_lines, read_tensor_bytes
from tests.store.books import make


@pytest.fixture(autouse=True)
def at_once():
    """What blocks, or reads for ever, fails here instead of hanging."""

    def late(*_):
        raise AssertionError("it takes more than five seconds")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    start = time.monotonic()
    yield
    signal.alarm(0)
    assert time.monotonic() - start < 4


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def sparse(path):
    with path.open("wb") as file:
        file.truncate(10**9)


def sparse_and_longer(path):
    with path.open("wb") as file:
        file.truncate(10**11)


def deep(path):
    path.write_text("[" * 1000 + "]" * 1000)


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def latin(path):
    path.write_bytes('{"a": "ü"}'.encode("latin-1"))


READERS = {
    "json": lambda path: read_json(path, "fix it"),
    "lines": lambda path: read_lines(path, "fix it"),
    "tensors": lambda path: parse_tensors(path, read_tensor_bytes(path, "fix it"), "fix it"),
    "picture": read_image,
    "journal": lambda path: Journal(path, {"a": 1}),
    "other journal": lambda path: Journal(None, {"a": 1}, [path]),
    "released": lambda path: Codebook.from_released(path, path),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("make_file", [fifo, device, sparse, sparse_and_longer, deep, pointer, latin, os.mkdir])
def test_odd_files(tmp_path, kind, make_file):
    make_file(path := tmp_path / "odd")
    with pytest.raises(CodebookError) as caught:
        READERS[kind](path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700 and str(path) in message
    expected = {
        fifo: "regular file", device: "regular file", os.mkdir: "regular file", sparse_and_longer: "bytes",
        pointer: "Git LFS",
    }  # fmt: skip
    assert expected.get(make_file, "") in message, message


@pytest.mark.parametrize("kind", [kind for kind in READERS if "journal" not in kind])  # which refuse every link
def test_what_the_system_refuses_has_the_remedy_for_that(tmp_path, kind):
    os.symlink("loop", path := tmp_path / "loop")
    with pytest.raises(CodebookError, match=r"it is a symbolic link: name the file itself$") as caught:
        READERS[kind](path)
    assert "Errno" not in str(caught.value)


def test_a_closed_file_and_one_of_another_kind_have_remedies_of_their_own():
    said = str(cannot_read("a.json", PermissionError(13, "of a library", "a.json"), "write JSON"))
    assert said == "cannot read a.json: Permission denied; choose another path, or change its permissions"
    assert str(cannot_read("a.png", OSError("cut off"), "give a PNG")) == "cannot read a.png: cut off; give a PNG"
    odd = OSError(1094995529, "Invalid data")  # as FFmpeg's, whose numbers are its own
    assert str(cannot_read("a.mp4", odd, "give a clip")) == "cannot read a.mp4: Invalid data; give a clip"


@pytest.mark.parametrize("name", ["config.json", "provenance.jsonl", "prototypes.safetensors"])
@pytest.mark.parametrize("make_file", [fifo, device, sparse, sparse_and_longer, deep, pointer, latin, os.mkdir])
def test_odd_files_in_a_codebook(tmp_path, name, make_file):
    make().save(tmp_path)
    (tmp_path / name).unlink()
    make_file(tmp_path / name)
    with pytest.raises(CodebookError, match=name):
        Codebook.load(tmp_path)


def test_links_are_followed_when_reading(tmp_path):
    make().save(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for file in (tmp_path / "real").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    assert len(Codebook.load(tmp_path / "linked")) == 50


def test_lines_end_in_a_line_feed_and_nothing_else(tmp_path):
    path = tmp_path / "x.jsonl"
    texts = ["a\u2028b", "c\u0085d", "e\u2029f", "\u000b \u001c"]
    lines = [json.dumps(text, ensure_ascii=i % 2 == 1) for i, text in enumerate(texts)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([lines[0], "", "  ", *lines[1:]]).encode())
    assert read_lines(path, "") == [(1, texts[0]), (4, texts[1]), (5, texts[2]), (6, texts[3])]
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path, "") == {"a": 1}


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_would_be_written_on_as_no_json(tmp_path, number):
    """Under a key that nobody checks; JSON has no such numbers, and other readers refuse the whole file."""
    path = tmp_path / "x.json"
    path.write_text(f'{{"a": [{{"b": {number}}}]}}')
    for read in (read_json, read_lines):
        with pytest.raises(CodebookError, match=r"cannot read .*x\.json.*no finite number"):
            read(path, "fix it")
    path.write_text('{"a": [1e308, 5e-324, 0.1]}')
    assert read_json(path, "") == {"a": [1e308, 5e-324, 0.1]}


@pytest.mark.parametrize("read", [read_json, read_lines])
def test_a_key_that_stands_twice_is_named(tmp_path, read):
    """At any depth, also with the same value, and written with an escape; readers differ in which one they take."""
    path = tmp_path / "x.json"
    for twice in ('{"a": 1, "b": 2, "a": 3}', '[{"c": {"a": 1, "a": 1}}]', '{"a": 1, "\\u0061": 2}'):
        path.write_text(twice)
        with pytest.raises(CodebookError, match=r"cannot read .*x\.json.*'a' is given twice: give it once.*"):
            read(path, "fix it")
    path.write_text('{"a": {"a": 1}, "b": {"a": 2}, "": null}')
    assert read_json(path, "") == {"a": {"a": 1}, "b": {"a": 2}, "": None}


def test_questions_and_schedules_that_say_one_thing_twice(tmp_path):
    questions, schedule = tmp_path / "x.jsonl", tmp_path / "x.json"
    questions.write_text('{"image": "a.png", "question": "what?", "answer": "yes", "answer": "no"}\n')
    schedule.write_text('{"format": 1, "schedule": "random:0.5", "schedule": "random:0.1"}')
    for read, key in ((partial(read_samples, questions), "answer"), (partial(Plan, str(schedule)), "schedule")):
        with pytest.raises(CodebookError, match=f"'{key}' is given twice"):
            read()


def test_a_header_larger_than_its_file(tmp_path):
    path = tmp_path / "x.safetensors"
    whole = save({"a": torch.zeros(3)})
    for size in (10**11, 2**63, len(whole)):
        path.write_bytes(size.to_bytes(8, "little") + whole[8:])
        with pytest.raises(CodebookError, match=r"cannot read .*x\.safetensors: .*; fix it"):
            READERS["tensors"](path)


def test_what_is_prepared_under_a_temporary_name_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "ab" * n)
    (tmp_path / f".codebook-{'ab' * 8}.tmp").symlink_to(victim)
    with pytest.raises(OSError, match="File exists"):
        write_files(tmp_path, {"a.json": b"{}"})
    assert victim.read_text() == "precious" and not (tmp_path / "a.json").exists()


def test_names_of_earlier_versions_are_not_followed(tmp_path):
    victim, book = tmp_path / "victim", tmp_path / "book"
    victim.write_text("precious")
    (book / ".build").mkdir(parents=True)
    for name in (".config.json.tmp", ".prototypes.safetensors.tmp", ".build/lock", ".build/.key.json.tmp"):
        (book / name).symlink_to(victim)
    make().save(book)
    assert victim.read_text() == "precious" and len(Codebook.load(book)) == 50


@pytest.mark.parametrize("make_file", [fifo, device, os.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_only_regular_files_are_replaced(tmp_path, make_file):
    make_file(path := tmp_path / "config.json")
    before = path.lstat()
    for write in (
        lambda: write_files(tmp_path, {"config.json": b"{}"}),
        lambda: replacing(path).__enter__(),
        lambda: make().save(tmp_path),
        lambda: Journal(path, {}),
    ):
        with pytest.raises(CodebookError, match=r"config\.json is there and no regular file"):
            write()
    assert path.lstat() == before and [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_permissions_are_those_of_a_plain_file(tmp_path):
    old = os.umask(0o027)
    try:
        write_files(tmp_path, {"a": b""})
        with replacing(tmp_path / "b") as temporary:
            temporary.write_text("b")
    finally:
        os.umask(old)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"} == {0o640}


def test_what_kills_left_is_removed_and_what_lives_is_not(tmp_path):
    for name in (".codebook-0011.tmp", ".codebook-notes", "codebook-1.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".codebook-link.tmp").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / ".codebook-pipe.tmp")
    with replacing(tmp_path / "a") as living:
        living.write_text("a")
        with replacing(tmp_path / "b") as temporary:
            temporary.write_text("b")
        assert living.exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a", "b", ".codebook-notes", "codebook-1.tmp", ".codebook-link.tmp", ".codebook-pipe.tmp"}


def test_an_interrupted_write_leaves_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "nul\0", "", "missing"])
def test_names_that_no_file_has(tmp_path, name):
    """Names in data are asked for, whatever they are: a sample's, a data set's, a list's."""
    assert not is_file(tmp_path / name)
    for kind in ("image", "video"):
        record = {kind: name or "?", "question": "describe."}
        (tmp_path / "samples.jsonl").write_text(json.dumps(record) + "\n")
        with pytest.raises(CodebookError):
            read_samples(tmp_path / "samples.jsonl")
    with pytest.raises(CodebookError):
        Codebook.load(tmp_path / (name or "?"))
