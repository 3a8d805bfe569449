"""kill -9 of a replica under load: clients see retried requests at most, and Ray starts another replica.

    python -m benchmarks.faults.serve_ray                    # 100 requests of 16 clients, 2 replicas, 1 kill
    python -m benchmarks.faults.serve_ray --requests 400 --kills 3

`codebook serve miniature --engine ray` runs in a process of its own. Three requests of four are chats of the `openai`
client, which retries by itself; the fourth asks for redundancy scores, and is asked again here. Every answer must be
the one that `ask`, or the codebook itself, gives in this process. At even distances a replica that is at work is
killed. Ends with an error if an answer differs or does not come, or a replica does not come back.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
from openai import OpenAI

from benchmarks.served import ServiceProcess, sample_body
from codebook import Client, CodebookError, Schedule, load, prebuilt
from codebook.inference.ask import ask
from codebook.miniature.samples import of_miniature

KEEP = 0.2
RETRIES = 8
"""Most times that one request is asked again."""
PAUSE = 1.0
"""Seconds before scores are asked for again."""
PATIENCE = 120
"""Seconds for a killed replica to be replaced."""


class Load:
    """Requests and the answers that must come; counts what happened."""

    def __init__(self, url: str, distinct: int = 24) -> None:
        model, processor = load("miniature", "cpu")
        schedule, book = Schedule.for_model(model, "seeded", KEEP), prebuilt(model)
        samples = of_miniature("test", 2, -(-distinct // 11))[:distinct]
        self.chats = []
        for sample in samples:
            [answer] = ask(model, processor, [sample.pictures()], [sample.question], schedule)
            self.chats.append((sample_body(sample), answer.text))
        self.features = np.random.default_rng(0).standard_normal((144, book.dimension)).astype("float32")
        import torch

        self.redundancy = book.redundancy(torch.from_numpy(self.features)).numpy()
        self.openai = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=RETRIES, timeout=60)
        self.scores = Client(url, timeout=60)
        self.happened: Counter[str] = Counter()
        self.lock = threading.Lock()

    def request(self, number: int) -> None:
        retries, right = self._score() if number % 4 == 3 else self._chat(number)
        with self.lock:
            self.happened["answered"] += 1
            self.happened["right"] += right
            self.happened["retried requests"] += retries > 0
            self.happened["retries"] += retries

    def _chat(self, number: int) -> tuple[int, bool]:
        body, text = self.chats[number % len(self.chats)]
        raw = self.openai.chat.completions.with_raw_response.create(**body)
        return raw.retries_taken, raw.parse().choices[0].message.content == text

    def _score(self) -> tuple[int, bool]:
        for attempt in range(RETRIES + 1):
            try:
                found = self.scores.score("miniature", self.features, KEEP)
                return attempt, bool(np.array_equal(found.redundancy, self.redundancy))
            except CodebookError:
                if attempt == RETRIES:
                    raise
                time.sleep(PAUSE)
        raise AssertionError


def replicas(service: ServiceProcess) -> list[psutil.Process]:
    """The processes of the service's replicas."""
    found = []
    for process in psutil.Process(service.process.pid).children(recursive=True):
        try:
            if "ServeReplica" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kills", type=int, default=1)
    options = parser.parse_args()
    engine = ["--engine", "ray", "--replicas", str(options.replicas), "--codebook", "miniature", "--keep", str(KEEP)]
    begun = time.monotonic()
    with ServiceProcess(*engine) as service:
        report = {"clients": options.clients, "replicas": options.replicas}
        report["seconds to start"] = round(time.monotonic() - begun, 1)
        asked, killed = Load(service.url), []
        start = time.monotonic()
        with ThreadPoolExecutor(options.clients) as pool:
            waiting = [pool.submit(asked.request, number) for number in range(options.requests)]
            for kill in range(1, options.kills + 1):
                while asked.happened["answered"] < kill * options.requests // (options.kills + 1):
                    time.sleep(0.02)
                victim = replicas(service)[0]
                victim.kill()
                killed.append(victim.pid)
            failed = [str(one.exception()) for one in waiting if one.exception() is not None]
        report |= {**asked.happened, "failed": len(failed), "killed": len(killed)}
        report["seconds"] = round(time.monotonic() - start, 1)
        while len(alive := replicas(service)) < options.replicas and time.monotonic() - start < PATIENCE:
            time.sleep(0.2)
        report["replicas at the end"] = len(alive)
        code = service.terminate(120)
    print(json.dumps(report))
    if failed or asked.happened["right"] < options.requests or len(alive) < options.replicas or code:
        raise SystemExit(f"exit code {code} of the service; failed: {failed[:3]}")


if __name__ == "__main__":
    main()
