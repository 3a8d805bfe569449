"""The client: what it sends and gets, without torch for users of NumPy, and in one sentence what went wrong."""

import http.server
import json
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from codebook import Client
from codebook.errors import CodebookError
from codebook.serving.metrics import Metrics
from codebook.serving.shelf import Shelf
from codebook.serving.state import State
from tests.serving.running import Running
from tests.store.books import make, tokens

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    make().save(folder)
    return Shelf({"small": folder})


@pytest.fixture(scope="module")
def service(shelf):
    running = Running(State(metrics=Metrics(), shelf=shelf))
    yield running.url
    running.stop()


@pytest.fixture
def answering():
    """Start a server that answers every request with these bytes; returns a client of it."""

    @contextmanager
    def start(status, body, **headers):
        class Handler(http.server.BaseHTTPRequestHandler):
            def reply(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status, "so\x1b[31m")
                for name, value in ({"Content-Length": len(body)} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = reply

            def log_message(self, *_):
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,)).start()
            try:
                yield Client(f"http://127.0.0.1:{server.server_port}", timeout=5)
            finally:
                server.shutdown()

    return start


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_torch_in_and_torch_out(service, dtype):
    features, book = tokens().to(dtype), make()
    redundancy, kept = Client(service).score("small", features.T.contiguous().T, keep=7, method="codebook")
    assert torch.equal(redundancy, book.redundancy(features)) and kept.dtype == torch.int64
    assert kept.tolist() == sorted(redundancy.topk(7, largest=False).indices.tolist())


def test_numpy_in_and_numpy_out_without_torch(service):
    """In a process that must not have imported torch."""
    script = (
        "import sys, numpy, codebook\n"
        f"client = codebook.Client({service!r})\n"
        "features = numpy.linspace(-1, 1, 3 * 40 * 16).reshape(3, 40, 16)\n"
        "for dtype in ('float16', 'float32', '>f4'):\n"
        "    redundancy, kept = client.score('small', features.astype(dtype)[:, ::2], keep=0.25)\n"
        "    assert type(redundancy) is type(kept) is numpy.ndarray\n"
        "    assert redundancy.shape == (3, 20) and redundancy.dtype == 'float32'\n"
        "    assert kept.shape == (3, 5) and kept.dtype == 'int64'\n"
        "assert client.codebooks()[0]['dimension'] == 16\n"
        "assert not {'torch', 'transformers', 'fastapi'} & set(sys.modules)\n"
        "print(redundancy.tobytes().hex())\n"
    )
    said = subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    features = torch.from_numpy(np.linspace(-1, 1, 3 * 40 * 16).reshape(3, 40, 16).astype("float32")[:, ::2].copy())
    assert said.strip() == torch.stack([make().redundancy(image) for image in features]).numpy().tobytes().hex()


def test_a_body_that_is_too_large(service):
    """The service answers before it has read it, and closes."""
    with pytest.raises(CodebookError, match="more than 20,971,520 bytes"):
        Client(service).score("small", np.zeros((2**19, 16), "float32"))


def test_keys(shelf):
    running = Running(State(metrics=Metrics(), shelf=shelf, api_key="sesame"))
    assert Client(running.url, "sesame").codebooks()[0]["name"] == "small"
    for key in (None, "other"):
        with pytest.raises(CodebookError, match="no API key, or another one"):
            Client(running.url, key).score("small", tokens())
    running.stop()


def test_the_listing(service):
    [book] = Client(service + "/").codebooks()
    assert book["name"] == "small" and book["prototypes"] == 50 and len(book["sha256"]) == 64


def test_refusals_are_the_services_sentences(service):
    client = Client(service)
    for name, features, options, words in [
        ("large", tokens(), {}, "this service has small"),
        ("small", tokens(d=8), {}, "(n, 16)"),
        ("small", tokens(), {"keep": 1.5}, "keep must be"),
        ("small", tokens(), {"keep": np.float64(1.5)}, "keep must be"),
        ("small", tokens(), {"method": "fastv"}, "seeded"),
        ("../x", tokens(), {}, "Not Found"),
        ("small\ud800", tokens(), {}, "no codebook 'small?'"),
    ]:
        with pytest.raises(CodebookError) as refused:
            client.score(name, features, **options)
        assert words in str(refused.value)


def test_what_is_refused_before_it_is_sent():
    client = Client("http://127.0.0.1:9")
    for features in (tokens().double(), tokens().double().numpy(), tokens().numpy().astype("int64"), [[1.0, 2.0]]):
        with pytest.raises(CodebookError, match="features are"):
            client.score("small", features)
    with pytest.raises(CodebookError, match="keep is True"):
        client.score("small", tokens(), keep=True)
    nested = torch.nested.nested_tensor([tokens(), tokens()[:3]], layout=torch.jagged)
    for tensor in (tokens().to_sparse(), tokens().to("meta"), nested):
        with pytest.raises(CodebookError, match="give a dense one"):
            client.score("small", tensor)
    masked = np.ma.masked_array(tokens().numpy(), mask=np.eye(40, 16, dtype=bool))
    with pytest.raises(CodebookError, match="features are MaskedArray"):
        client.score("small", masked)
    for name in (5, None, ""):
        with pytest.raises(CodebookError, match="the codebook's name is"):
            client.score(name, tokens())


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000", "ftp://x", "http://", "http://x:port", "http://me:word@x", "", "http://x?a", "http://x y",
        "http://x/\xe9", "http://x/\n", None, 5, b"http://x",
    ],
)  # fmt: skip
def test_addresses_that_are_none(url):
    with pytest.raises(CodebookError, match="address"):
        Client(url)


def test_keys_that_no_header_can_have():
    for key in ("a\r\nHost: y", "\xe9", 5, b"key"):
        with pytest.raises(CodebookError, match="api_key"):
            Client("http://x", api_key=key)


@pytest.mark.parametrize("timeout", [0, -1, None, "5", float("nan"), float("inf"), True])
def test_times_that_nobody_can_wait(timeout):
    with pytest.raises(CodebookError, match=f"timeout is {timeout!r}: give seconds"):
        Client("http://x", timeout=timeout)


def test_nobody_there():
    with pytest.raises(CodebookError, match=r"cannot reach http://127\.0\.0\.1:9: Connection refused"):
        Client("http://127.0.0.1:9").codebooks()
    with pytest.raises(CodebookError, match=r"cannot reach http://a\.\.b: "):
        Client("http://a..b").codebooks()


GOOD = {"redundancy": torch.zeros(40), "kept": torch.zeros(8, dtype=torch.int64)}


@pytest.mark.parametrize(("status", "body", "words"), [
    (200, b"", "no scores"),
    (200, b"\xff" * 100, "no scores"),
    (200, save({"redundancy": torch.zeros(40)}), "no scores"),
    (200, save(GOOD | {"redundancy": torch.zeros(39)}), r"scores of (39,)"),
    (200, b"a" * 100_000, "more than"),
    (302, b"", "302"),
    (502, b"<html>" + b"x" * 10**6, "502"),
    (429, json.dumps({"error": {"message": "busy\x1b[2J" + "z" * 10**4}}).encode(), r"busy\x1b[2J"),
    (500, json.dumps({"error": 3}).encode(), "500"),
])  # fmt: skip
def test_answers_of_strangers(answering, status, body, words):
    with answering(status, body, Location="http://127.0.0.1:9/") as client, pytest.raises(CodebookError) as refused:
        client.score("small", tokens().half())
    message = str(refused.value)
    assert words in message and message.isprintable() and len(message) <= 600


def test_an_answer_that_is_cut_off(answering):
    with answering(200, b"{", **{"Content-Length": 100}) as client, pytest.raises(CodebookError, match="cut off"):
        client.codebooks()


def test_an_answer_that_does_not_come():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        client = Client(f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout=0.1)
        with pytest.raises(CodebookError, match=r"did not answer for 0\.1 s"):
            client.codebooks()
