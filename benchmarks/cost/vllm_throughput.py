"""Served throughput of vLLM: requests per second and time to the first token, unpruned and pruned side by side.

    python -m benchmarks.cost.vllm_throughput --engine-args=--enforce-eager              # eyes, on a CPU
    python -m benchmarks.cost.vllm_throughput --engine-args=--enforce-eager --model miniature
    python -m benchmarks.cost.vllm_throughput --shape 7b --dtype bfloat16 --engine-args '--gpu-memory-utilization 0.22'

vLLM's own server runs once per setting, all at the same time, and each is asked while the others rest: first the one
and then the next, in every round and at every concurrency, so that other load on the machine falls on all of them
alike. Every request shows a picture that no server has seen, is answered as a stream, and ends after so many tokens.
`--shape 7b` takes a model of LLaVA-1.5-7B's shape with random weights, which are made on the spot; four of them need
about 60 GB on a GPU. Prints a table in markdown; `--json` writes what it is made of.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.served import chat_body
from codebook.evaluation.timing import machine
from codebook.integrations.vllm.launch import Launch
from codebook.models.loading import SHIPPED_MODELS, read_config_of

KEEPS = (None, 0.5, 0.22, 0.11)
"""What stays of an image; None: all, by vLLM's own class."""
CONCURRENCY = (1, 8, 32)
START_SECONDS = 900.0
SERVED = "model"


@dataclass
class Cell:
    """What was measured of one setting at one concurrency, over all rounds: requests per second, seconds to a token."""

    rates: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def quantile(self, share: float) -> float:
        """Seconds to the first token that this share of all requests did not exceed."""
        return sorted(self.first)[min(len(self.first) - 1, int(share * len(self.first)))]


def shape_7b(folder: Path) -> Path:
    """A folder of a model of LLaVA-1.5-7B's shape without weights, with the miniature's few words."""
    for file in SHIPPED_MODELS["miniature"].iterdir():
        if file.suffix in (".json", ".jinja"):
            (folder / file.name).write_text(file.read_text())
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    config["text_config"] |= {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32064, "max_position_embeddings": 4096,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | {"image_seq_length": 576}))
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"height": 336, "width": 336}
    (folder / "processor_config.json").write_text(json.dumps(processor | {"patch_size": 14}))
    return folder


def stock_folder(model: str, folder: Path) -> Path:
    """The model as vLLM's own class loads it: transformers 5 saves CLIP's weights by names that it does not know."""
    place = read_config_of(model)[0]
    for file in place.iterdir():
        if file.suffix == ".safetensors":
            weights = load_file(file)
            old, new = "vision_tower.", "vision_tower.vision_model."
            save_file({name.replace(old, new): own for name, own in weights.items()}, folder / file.name)
        elif file.is_file():
            shutil.copy(file, folder)
    return folder


class Server:
    """vLLM's server of a model, pruned or not; a context that ends it."""

    def __init__(self, model: str, method: str, keep: float | None, words: list[str], log: Path) -> None:
        if keep is None:
            pruning = ["--model", str(stock_folder(model, Path(tempfile.mkdtemp(dir=log.parent))))]
        else:
            launch = Launch.of(model, method, keep)
            pruning = ["--model", launch.model, "--hf-overrides", launch.json]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", *pruning, "--served-model-name", SERVED,
            "--port", str(port), "--disable-uvicorn-access-log", *words,
        ]  # fmt: skip
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | dict(os.environ)
        with log.open("w") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(1)
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def bodies(count: int, side: int, tokens: int, generator: np.random.Generator) -> list[dict]:
    """Requests, each with a picture of its own."""
    found = []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        fields = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        found.append(chat_body([coarse.resize((side, side))], "is there a red circle?", **fields) | {"model": SERVED})
    return found


def first_token(client: httpx.Client, body: dict) -> float:
    """Seconds until the first token of an answer, which is then read to its end."""
    start, events = time.perf_counter(), list[float]()
    with client.stream("POST", "/v1/chat/completions", json=body, timeout=600) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                events.append(time.perf_counter() - start)
    return events[1]  # the first event says who speaks


def measure(server: Server, concurrency: int, asked: list[dict], cell: Cell | None) -> None:
    """Ask all of them from so many clients at once; without a cell, to warm up."""
    with httpx.Client(base_url=server.url, limits=httpx.Limits(max_connections=concurrency)) as client:
        start = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as clients:
            first = list(clients.map(lambda body: first_token(client, body), asked))
        if cell is not None:
            cell.rates.append(len(asked) / (time.perf_counter() - start))
            cell.first += first


def table(cells: dict[tuple[float | None, int], Cell]) -> Iterator[str]:
    yield "| concurrency | keep | requests/s | times unpruned | TTFT p50, ms | TTFT p99, ms |"
    yield "|--:|--:|--:|--:|--:|--:|"
    for concurrency in CONCURRENCY:
        for keep in KEEPS:
            cell, whole = cells[keep, concurrency], cells[None, concurrency]
            ratio = statistics.median(own / other for own, other in zip(cell.rates, whole.rates, strict=True))
            yield (
                f"| {concurrency} | {'all' if keep is None else keep} | {cell.rate:.2f} | {ratio:.2f} | "
                f"{1000 * cell.quantile(0.5):.0f} | {1000 * cell.quantile(0.99):.0f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="eyes")
    parser.add_argument("--shape", choices=["7b"], help="random weights instead of a model's")
    parser.add_argument("--method", default="codebook-farthest")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32, help="per setting, concurrency and round; at 1, a quarter")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--engine-args", default="", help="more arguments of vLLM's server")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    words = [
        "--dtype",
        options.dtype,
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "32",
        *shlex.split(options.engine_args),
    ]
    generator = np.random.default_rng(0)
    cells = {(keep, concurrency): Cell() for keep in KEEPS for concurrency in CONCURRENCY}
    with tempfile.TemporaryDirectory() as held, contextlib.ExitStack() as ended:
        model, method = options.model, options.method
        if options.shape:
            model, words = str(shape_7b(Path(held))), [*words, "--load-format", "dummy"]
            method = "farthest" if method.startswith("codebook") else method  # no codebook is for random weights
        side = read_config_of(model)[1].vision_config.image_size
        servers = {}
        for keep in KEEPS:
            server = Server(model, method, keep, words, Path(held) / f"log-{keep}")
            servers[keep] = ended.enter_context(server)
            if torch.cuda.is_available():  # one by one: each measures what memory is left for it
                server.wait()
        for keep, server in servers.items():
            server.wait()
            measure(server, 8, bodies(16, side, options.tokens, generator), None)
            print(f"keep {keep}: ready", file=sys.stderr)
        for number in range(options.rounds):
            for concurrency in CONCURRENCY:
                count = max(8, options.requests // 4) if concurrency == 1 else max(options.requests, concurrency)
                for keep in KEEPS if number % 2 == 0 else KEEPS[::-1]:
                    asked = bodies(count, side, options.tokens, generator)
                    measure(servers[keep], concurrency, asked, cells[keep, concurrency])
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    lines = list(table(cells))
    print(f"{options.shape or options.model}, {method}, {options.dtype}, {options.rounds} rounds; {machine('cpu')}")
    print("\n".join(lines))
    if options.json:
        written = [
            {"keep": keep, "concurrency": concurrency, "requests_per_second": cell.rates, "ttft_seconds": cell.first}
            for (keep, concurrency), cell in cells.items()
        ]
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "cells": written}))


if __name__ == "__main__":
    main()
