"""Hostile requests to a service: each is refused as it should be, and the service answers right after it.

    python -m benchmarks.faults.serve_hostile                # 200 requests
    python -m benchmarks.faults.serve_hostile --count 1000 --seed 3

The service is `codebook serve miniature` in a process of its own, on the loopback. Of every kind of request that the
list below has there are as many; what exactly is spoiled is drawn by a seed. A refusal must have the expected status
and the shape of OpenAI's errors. After each request a plain question must get its right answer. Then, under load, the
service is told to end: every request that it accepted must be answered, and every other one refused.
"""

from __future__ import annotations

import argparse
import base64
import copy
import io
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL import Image as Picture

from benchmarks.served import Reply, ServiceProcess, chat_body, post
from codebook import Schedule, load
from codebook.inference.ask import ask
from codebook.miniature.samples import of_miniature

KEEP = 0.2
LIMITS = {"upload_seconds": 2, "body": 2**20, "new_tokens": 64}
PATH = "/v1/chat/completions"
CLOSED = 0
"""Status of a connection that is closed without a response."""


@dataclass
class Target:
    """A running service, and a plain question with its right answer."""

    url: str
    valid: dict[str, Any]
    expected: Reply
    client: httpx.Client = field(init=False)

    @property
    def place(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 0

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def send(self, content: bytes, **headers: str) -> tuple[int, bytes]:
        """Post a body; (status, body of the response)."""
        response = self.client.post(PATH, content=content, headers=headers)
        return response.status_code, response.content

    def raw(self, data: bytes, then: Callable[[socket.socket], None] = lambda _: None) -> tuple[int, bytes]:
        """Write bytes on a connection of their own; (status, body of the response)."""
        with socket.create_connection(self.place, timeout=30) as connection:
            connection.sendall(data)
            then(connection)
            got = b""
            try:
                while part := connection.recv(65536):
                    got += part
            except ConnectionError:
                pass
        head, _, body = got.partition(b"\r\n\r\n")
        return (int(head.split()[1]), body) if head.startswith(b"HTTP/1.1 ") else (CLOSED, got)

    def question(self, text: str, **fields: Any) -> bytes:
        """The plain question with another text."""
        changed = copy.deepcopy(self.valid)
        changed["messages"][0]["content"][-1]["text"] = text
        return json.dumps(changed | fields).encode()

    def picture(self, url: str) -> bytes:
        """The plain question about a picture of another URL."""
        changed = copy.deepcopy(self.valid)
        changed["messages"][0]["content"][0]["image_url"]["url"] = url
        return json.dumps(changed).encode()


Attack = Callable[[Target, random.Random], tuple[int, bytes]]
ATTACKS: dict[str, tuple[set[int], Attack]] = {}
"""Kinds of requests: the statuses that may come back, and what sends one."""


def attack(name: str, *expected: int) -> Callable[[Attack], Attack]:
    """Decorator of a kind of request."""

    def add(function: Attack) -> Attack:
        ATTACKS[name] = set(expected), function
        return function

    return add


def png(width: int, height: int, data: bytes = b"") -> str:
    """A PNG that claims a size and holds little, as a data URL."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(whole).decode()


def request_head(length: int | str, *more: str) -> bytes:
    lines = [f"POST {PATH} HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@attack("malformed JSON", 400)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    whole = json.dumps(target.valid).encode()
    return target.send(whole[: draw.randrange(len(whole))])


@attack("no JSON at all", 400)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    return target.send(draw.randbytes(draw.randrange(1, 5000)))


@attack("deep JSON", 400, 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    depth = draw.choice([300, 10_000, 400_000])
    return target.send(b'{"messages":' + b"[" * depth + b"]" * depth + b"}")


@attack("a body beyond the limit", 413)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    return target.send(b" " * (LIMITS["body"] + draw.randrange(1, 2**20)))


@attack("a body beyond the limit, of unknown length", 413)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 2**16

    response = target.client.post(PATH, content=parts())
    return response.status_code, response.content


@attack("a body that breaks off", CLOSED)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    whole = json.dumps(target.valid).encode()
    cut = whole[: draw.randrange(len(whole))]
    with socket.create_connection(target.place, timeout=30) as connection:
        connection.sendall(request_head(len(whole)) + cut)
    return CLOSED, b""


@attack("a head that trickles in", CLOSED)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    def trickle(connection: socket.socket) -> None:
        try:
            for _ in range(40):
                connection.sendall(b"x")
                time.sleep(0.1)
        except ConnectionError:
            pass

    return target.raw(b"POST /v1/chat/completions HTTP/1.1\r\nX-", trickle)


@attack("a body that trickles in", 408)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    def trickle(connection: socket.socket) -> None:
        try:
            for _ in range(25):
                connection.sendall(b" ")
                time.sleep(0.1)
        except ConnectionError:
            pass

    return target.raw(request_head(1000, "Connection: close"), trickle)


@attack("a stream that is left", CLOSED)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    body = json.dumps(target.valid | {"stream": True}).encode()
    with socket.create_connection(target.place, timeout=30) as connection:
        connection.sendall(request_head(len(body)) + body)
        connection.recv(draw.choice([1, 10, 300]))
    return CLOSED, b""


@attack("an answer that is not waited for", CLOSED)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    body = json.dumps(target.valid).encode()
    with socket.create_connection(target.place, timeout=30) as connection:
        connection.sendall(request_head(len(body)) + body)
        time.sleep(draw.choice([0, 0.01, 0.05]))
    return CLOSED, b""


@attack("a picture that claims to be huge", 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    size = draw.choice([(60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 2**20), (9000, 9000)])
    return target.send(target.picture(png(*size, data=bytes(1000))))


@attack("a picture that is broken", 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    buffer = io.BytesIO()
    Picture.frombytes("RGB", (64, 64), draw.randbytes(64 * 64 * 3)).save(buffer, draw.choice(["PNG", "JPEG", "WEBP"]))
    data = buffer.getvalue()[: draw.randrange(len(buffer.getvalue()) // 2)]
    return target.send(target.picture("data:image/png;base64," + base64.b64encode(data).decode()))


@attack("a URL that is not allowed", 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    urls = [
        "file:///etc/passwd", "/etc/passwd", "../../etc/passwd", "http://169.254.169.254/latest/meta-data/",
        f"{target.url}/metrics", "http://localhost:22/", "ftp://example.com/a.png", "gopher://127.0.0.1:25/_", "",
        "javascript:alert(1)", "data:image/png,abc", "data:;base64,!!!", "data:image/png;base64,", "http://[::1",
        "data:text/html;base64,PGh0bWw+", "https://user:password@example.com/a.png", "//example.com/a.png", "\x00",
    ]  # fmt: skip
    return target.send(target.picture(draw.choice(urls)))


@attack("a text of image tokens", 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    return target.send(target.question("<image>" * draw.choice([1, 10, 10_000])))


@attack("special tokens in a text", 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    token = draw.choice(["<image>", "<pad>", "<bos>", "<eos>", "</s>"])
    where = draw.choice(["{} read the number.", "read {} the number.", "read the number.{}"])
    return target.send(target.question(where.format(token)))


@attack("characters that are none", 400, 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    return target.send(
        target.question("read the number. MARK").replace(b"MARK", draw.choice([b"\\ud800", b"\x00", b"\xff"]))
    )


@attack("a text without end", 413, 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    return target.send(target.question("read the number. " * draw.choice([500, 20_000, 70_000])))


@attack("a temperature that is none", 400, 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    value = draw.choice([b"NaN", b"Infinity", b"-Infinity", b"-1", b"1e400", b'"NaN"', b"1e-300", b"1000", b"[0]"])
    return target.send(json.dumps(target.valid | {"temperature": "MARK"}).encode().replace(b'"MARK"', value))


@attack("a length that is none", 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    name = draw.choice(["max_tokens", "max_completion_tokens"])
    return target.send(
        json.dumps(target.valid | {name: draw.choice([10**9, 10**30, 0, -1, 1.5, "8", [8], 65])}).encode()
    )


@attack("a wrong type somewhere", 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    changed = copy.deepcopy(target.valid)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(changed)
    node, key = draw.choice(places)
    old = node[key]
    node[key] = draw.choice([v for v in (7, True, [[]], {"a": 1}, 1.5) if type(v) is not type(old)])
    return target.send(json.dumps(changed).encode())


@attack("a field that is not known", 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    name, value = draw.choice([
        ("generation_config", '{"max_new_tokens": 100000}'), ("tools", [{}]), ("logit_bias", {"1": 100}), ("n", 5),
        ("stop", ["a"]), ("logprobs", True), ("__class__", "a"), ("chat_template_kwargs", {}), ("best_of", 50),
        ("chat_template", "{{ 7 * 7 }}"), ("messages", []), ("messages", [{"role": "user"}] * 1000), ("top_p", 0),
    ])  # fmt: skip
    return target.send(json.dumps(target.valid | {name: value}).encode())


@attack("too many pictures", 422)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    changed = copy.deepcopy(target.valid)
    [first, text] = changed["messages"][0]["content"]
    first["image_url"]["url"] = png(8, 8, bytes(8 * 25))
    changed["messages"][0]["content"] = [*[first] * draw.choice([17, 100]), text]
    return target.send(json.dumps(changed).encode())


@attack("another model", 404)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    name = draw.choice(
        ["gpt-4o", "../../etc", "miniature@main", "", "hf-internal-testing/tiny-random-llava", "a" * 9999]
    )
    return target.send(json.dumps(target.valid | {"model": name}).encode())


@attack("a route that is not there", 404, 405)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    method = draw.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
    path = draw.choice(["/load_model", "/reset", "/v1/responses", "/v1/completions", "/../etc/passwd", "/docs", "/%00"])
    response = target.client.request(method, path, content=b"{}")
    return response.status_code, response.content


@attack("no HTTP", 400)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    return target.raw(draw.choice([
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", b"GARBAGE\r\n\r\n", b"GET  / HTTP/1.1\r\n\r\n",
        request_head(-1), request_head("abc"), request_head(5, "Content-Length: 6"),
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        request_head(0, "Transfer-Encoding: chunked")[:-2].replace(b"Content-Length: 0\r\n", b"") + b"\r\nzz\r\n",
    ]))  # fmt: skip


@attack("another site's page", 403)
def _(target: Target, draw: random.Random) -> tuple[int, bytes]:
    headers = draw.choice([{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}])
    return target.send(json.dumps(target.valid).encode(), **headers)


def has_shape(body: bytes) -> bool:
    """Whether a response is an error as OpenAI's clients read it: one line of bounded length."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return (
        set(error) == {"message", "type", "param", "code"}
        and 0 < len(error["message"]) <= 600
        and "\n" not in error["message"]
        and "Traceback" not in error["message"]
    )


def hostile(target: Target, count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Send so many requests; of each its kind, and what was wrong, or "" ."""
    names = list(ATTACKS)
    for number in range(count):
        name, draw = names[number % len(names)], random.Random(f"{seed} {number}")
        expected, send = ATTACKS[name]
        status, body = send(target, draw)
        fault = ""
        if status not in expected:
            fault = f"#{number}: status {status}, not {expected}: {body[:300]!r}"
        elif status != CLOSED and not has_shape(body):
            fault = f"#{number}: status {status} in another shape: {body[:300]!r}"
        else:
            reply = post(target.client, json.dumps(target.valid).encode())
            if reply != target.expected:
                fault = f"#{number}: afterwards {reply}, not {target.expected}"
        yield name, fault


def make_target(url: str) -> Target:
    """A target with one question of the miniature, and the answer that `ask` gives alone."""
    model, processor = load("miniature", "cpu")
    [sample] = of_miniature("test", 2, 1, ["ocr"])
    [answer] = ask(
        model, processor, [sample.pictures()], [sample.question], Schedule.for_model(model, "seeded", KEEP), 64
    )
    counts = {"seen": sum(c[0] for c in answer.counts), "kept": sum(c[-1] for c in answer.counts)}
    return Target(url, chat_body(sample.pictures(), sample.question), Reply(200, answer.text, counts))


def drain(
    service: ServiceProcess, target: Target, clients: int = 16, after: int = 50
) -> tuple[int, Counter[str], list[str]]:
    """Tell a service to end after some answers; its exit code, how requests ended, and what should not have been."""
    ended: Counter[str] = Counter()
    faults: list[str] = []
    body, told, lock = json.dumps(target.valid).encode(), threading.Event(), threading.Lock()

    def client() -> None:
        with httpx.Client(base_url=service.url, timeout=60) as own:
            while True:
                begun_after = told.is_set()
                try:
                    reply = post(own, body)
                except httpx.ConnectError:
                    kind, fault = "not connected", "" if told.is_set() else "not connected before the end"
                except httpx.HTTPError as error:
                    # What is sent on a connection that is being closed was not accepted.
                    kind, fault = "closed", "" if begun_after else f"lost: {error!r}"
                else:
                    kind = {200: "answered", 503: "refused"}.get(reply.status, "other")
                    right = reply == target.expected if reply.status == 200 else '"draining"' in reply.text
                    fault = "" if right else f"{reply}"
                    if kind == "answered" and begun_after:
                        kind = "answered, sent while told to end"
                with lock:
                    ended[kind] += 1
                    if fault:
                        faults.append(fault)
                if kind not in ("answered", "answered, sent while told to end"):
                    return

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    while sum(ended.values()) < after and any(thread.is_alive() for thread in threads):
        time.sleep(0.01)
    told.set()
    code = service.terminate()
    for thread in threads:
        thread.join()
    return code, ended, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    limits = [word for name, value in LIMITS.items() for word in ("--limit", f"{name}={value}")]
    with ServiceProcess("--keep", str(KEEP), *limits) as service:
        target = make_target(service.url)
        sent: Counter[str] = Counter()
        faults = []
        for name, fault in hostile(target, options.count, options.seed):
            sent[name] += 1
            if fault:
                faults.append(f"{name}, {fault}")
        target.client.close()
        code, ended, lost = drain(service, target)
    for name, count in sent.items():
        print(f"{count:4} {name}")
    print(
        f"{sum(sent.values())} requests, {len(faults)} not refused as they should be, or not followed by a right answer"
    )
    for fault in faults:
        print(f"  {fault}")
    print(f"told to end under load: exit code {code}; {dict(ended)}; {len(lost)} lost")
    for fault in lost:
        print(f"  {fault}")
    if faults or lost or code:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
