"""Pictures by URL: of named hosts alone, within limits of size and time, and never of private addresses by a name."""

import base64
import contextlib
import http.server
import socket
import threading
import time
from urllib.parse import quote

import pytest
from PIL import Image as Picture

from benchmarks.served import data_url
from codebook.errors import CodebookError
from codebook.serving import pictures
from codebook.serving.errors import ServiceError
from codebook.serving.limits import Limits
from codebook.serving.pictures import read_hosts, read_pictures

RED = Picture.new("RGB", (6, 4), "red")
LIMITS = Limits(body=10_000, upload_seconds=1)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = base64.b64decode(data_url(RED).partition(",")[2])
        if self.path == "/red.png?size=1":
            self.reply(200, data)
        elif self.path == "/redirect":
            self.reply(302, b"", ("Location", "/red.png?size=1"))
        elif self.path == "/large":
            self.reply(200, bytes(LIMITS.body + 1))
        elif self.path == "/trickle":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(60):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        else:
            self.reply(404, b"")

    def reply(self, status, data, *headers):
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    """`127.0.0.1:PORT` of a host with pictures."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def refused(url, hosts=()):
    with pytest.raises(ServiceError) as caught:
        read_pictures([url], LIMITS, read_hosts(hosts))
    assert caught.value.status == 422 and str(caught.value).startswith("image 1: ")
    return str(caught.value)


def test_a_data_url_is_read_whatever_it_calls_its_contents():
    url = data_url(RED).replace("image/png", "text/html;charset=x")
    [picture] = read_pictures([url], LIMITS, ())
    assert picture.size == (6, 4) and picture.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "encode",
    [base64.urlsafe_b64encode, base64.encodebytes, lambda data: quote(base64.b64encode(data), safe="").encode(),
     lambda data: base64.b64encode(data).rstrip(b"=")],
)  # fmt: skip
def test_a_data_url_in_another_kind_of_base64_is_refused(encode):
    message = refused(f"data:image/png;base64,{encode(bytes([0xFF, 0xFE] * 40)).decode()}")
    assert "no base64: " in message and "no line ends" in message


def test_a_named_host_is_asked(server):
    [picture] = read_pictures([f"http://{server}/red.png?size=1"], LIMITS, read_hosts([server]))
    assert picture.getpixel((5, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("path", "words"),
    [("/redirect", "status 302"), ("/none", "status 404"), ("/large", "more than 10,000 bytes")],
)
def test_what_a_host_answers_is_limited(server, path, words):
    assert words in refused(f"http://{server}{path}", [server])


def test_a_host_that_trickles_is_cut_off(server):
    start = time.monotonic()
    refused(f"http://{server}/trickle", [server])
    assert time.monotonic() - start < 2.5


def test_no_picture_is_waited_for_beyond_the_time_of_its_request(server):
    start, hosts = time.monotonic(), read_hosts([server])
    with pytest.raises(ServiceError, match="image 1: "):
        read_pictures([f"http://{server}/trickle"], LIMITS, hosts, start + 0.2)
    assert time.monotonic() - start < 0.9
    with pytest.raises(ServiceError) as caught:
        read_pictures([data_url(RED)], LIMITS, hosts, start + 0.2)
    assert (caught.value.status, caught.value.code) == (503, "timeout")


@pytest.mark.parametrize(
    "url",
    [
        "http://{server}/red.png?size=1", "http://localhost:{port}/red.png?size=1", "http://a@{server}/red.png?size=1",
        "http://{server}@evil.example/", "http://evil.example/{server}", "http://{host}/", "https://images.example:1/",
        "file://images.example/etc/passwd", "ftp://images.example/a.png", "http://images.example\\@{server}/",
        "http://images.example.evil.example/", "http://images.example /", "http://images.example/\r\nX: y", "http:///a",
    ],
)  # fmt: skip
def test_other_hosts_are_not_asked(server, url, monkeypatch):
    monkeypatch.setattr(pictures.socket, "getaddrinfo", lambda *_, **__: pytest.fail("a host was looked up"))
    host, _, port = server.partition(":")
    message = refused(url.format(server=server, host=host, port=port), ["images.example"])
    assert "URLs of its host are not fetched here" in message or "its URL is" in message


PRIVATE = ("127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fe80::1%1", "0.0.0.0", "100.64.0.1",
           "64:ff9b::10.0.0.1", "2002:a00:1::1")  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_that_leads_to_a_private_address_is_refused(address, monkeypatch):
    """Also if another of its addresses is public: which one is asked must not depend on luck."""
    found = [(0, 0, 0, "", (one, 80)) for one in ("93.184.216.34", address)]
    monkeypatch.setattr(pictures.socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(pictures.socket, "create_connection", lambda *_, **__: pytest.fail("it was asked"))
    assert "leads to a private address" in refused("http://images.example/a.png", ["images.example"])


def test_the_address_that_was_checked_is_asked(monkeypatch):
    """A name server that answers otherwise the second time leads nowhere else."""
    answers = iter([[(0, 0, 0, "", ("93.184.216.34", 80))], [(0, 0, 0, "", ("127.0.0.1", 80))]])
    monkeypatch.setattr(pictures.socket, "getaddrinfo", lambda *_, **__: next(answers))
    asked = []

    def connect(place, timeout):
        asked.append(place)
        raise ConnectionRefusedError("no")

    monkeypatch.setattr(pictures.socket, "create_connection", connect)
    assert "cannot fetch it" in refused("http://images.example/a.png", ["images.example"])
    assert asked == [("93.184.216.34", 80)]


def test_a_name_that_is_not_there_is_one_line(monkeypatch):
    def missing(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(pictures.socket, "getaddrinfo", missing)
    assert "cannot fetch it: " in refused("https://images.example/a.png", ["images.example"])


@pytest.mark.parametrize("name", ["https://images.example", "a/b", "", "*", "a b", "images.example:", "user@host",
                                  "a:65536", "[::1]:99999"])  # fmt: skip
def test_hosts_that_are_none(name):
    with pytest.raises(CodebookError, match="is no host"):
        read_hosts([name])
