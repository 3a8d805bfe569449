"""A service of the miniature in a process of its own, and requests for it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image as Picture

from codebook.inference.samples import Sample

START_SECONDS = 120.0


class ServiceProcess:
    """`codebook serve miniature` with further arguments; a context that ends it."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "codebook.cli", "serve", "miniature", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        lines: list[str] = []
        stuck = threading.Timer(START_SECONDS, self.process.kill)
        stuck.start()
        for line in self.process.stderr:
            lines.append(line)
            if found := re.search(r"(http://\S+)/v1", line):
                self.url = found[1]
                break
        else:
            raise RuntimeError("".join(lines) or "the service did not say where it is")
        stuck.cancel()

    def __enter__(self) -> ServiceProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self, seconds: float = 60) -> int:
        """Ask it to end by SIGTERM, and wait; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def rss(self) -> float:
        """MiB of memory that it holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]

    def cpu_seconds(self) -> float:
        """Processor time that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def data_url(picture: Picture.Image) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat_body(pictures: Sequence[Picture.Image], question: str, **fields: Any) -> dict[str, Any]:
    """A request that asks a question about pictures, as `ask` does."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    content = [*shown, {"type": "text", "text": question}]
    return {"model": "miniature", "messages": [{"role": "user", "content": content}], **fields}


def sample_body(sample: Sample, **fields: Any) -> dict[str, Any]:
    """A request that asks a sample's question about its pictures."""
    return chat_body(sample.pictures(), sample.question, **fields)


STREAM = {"stream": True, "stream_options": {"include_usage": True}}
"""Fields of a request for a stream that ends with its usage."""


@dataclass(frozen=True)
class Reply:
    """What came back: the answer's text, and the visual tokens that were seen and kept; or the status of a refusal."""

    status: int
    text: str = ""
    codebook: dict[str, int] | None = None


def post(client: httpx.Client, body: bytes) -> Reply:
    """Ask for a chat completion, whole or as a stream with its usage; the body says which."""
    with client.stream("POST", "/v1/chat/completions", content=body) as response:
        kind = response.headers.get("content-type", "")
        response.read()
    if response.status_code != 200:
        return Reply(response.status_code, response.text)
    if not kind.startswith("text/event-stream"):
        answer = response.json()
        return Reply(200, answer["choices"][0]["message"]["content"], answer["usage"]["codebook"])
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        return Reply(500, events[-1])
    chunks = [json.loads(event) for event in events[:-1]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return Reply(200, text, chunks[-1]["usage"]["codebook"])
