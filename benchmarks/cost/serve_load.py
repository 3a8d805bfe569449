"""Many clients of one service: every answer equals the one alone, memory stays, and how many requests per second.

    python -m benchmarks.cost.serve_load                                 # 1,000 requests of 32 clients
    python -m benchmarks.cost.serve_load --requests 200 --clients 8

The service is `codebook serve miniature` in a process of its own, on the loopback. Requests are questions of all task
families of the miniature, with one to six pictures; every fourth is answered as a stream. What `ask` answers to each
question alone, in this process, is what must come back, and so must the numbers of visual tokens. The same service is
asked one by one, by one client, before and after.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import dataclass

import httpx

from benchmarks.served import STREAM, Reply, ServiceProcess, post, sample_body
from codebook import Schedule, load
from codebook.evaluation.timing import machine
from codebook.inference.ask import ask
from codebook.miniature.samples import of_miniature

KEEP = 0.2
STREAMS = 4
"""One request of so many is a stream."""
SETTLED = 200
"""Requests after which memory is looked at first."""


@dataclass(frozen=True)
class Asked:
    """A request's body, and the reply that `ask` says must come."""

    body: bytes
    expected: Reply


def requests(count: int) -> list[Asked]:
    """Distinct questions, `count` of each task family, with their answers alone; every fourth as a stream."""
    model, processor = load("miniature", "cpu")
    schedule = Schedule.for_model(model, "seeded", KEEP)
    made = []
    for number, sample in enumerate(of_miniature("test", 1, count)):
        [answer] = ask(model, processor, [sample.pictures()], [sample.question], schedule)
        counts = {"seen": sum(c[0] for c in answer.counts), "kept": sum(c[-1] for c in answer.counts)}
        body = json.dumps(sample_body(sample, **({} if number % STREAMS else STREAM))).encode()
        made.append(Asked(body, Reply(200, answer.text, counts)))
    return made


def load_service(
    url: str, asked: list[Asked], total: int, clients: int, watch: threading.Event | None = None
) -> tuple[float, list[tuple[Reply, Reply]]]:
    """Ask `total` of the requests, in turn, from so many clients at once; seconds, and (reply, expected) of each.

    `watch` is set after `SETTLED` replies.
    """
    numbers, lock = iter(range(total)), threading.Lock()
    replies: list[tuple[Reply, Reply]] = []

    def client() -> None:
        with httpx.Client(base_url=url, timeout=120) as own:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                one = asked[number % len(asked)]
                reply = post(own, one.body)
                with lock:
                    replies.append((reply, one.expected))
                    if watch is not None and len(replies) == SETTLED:
                        watch.set()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - start, replies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    asked = requests(8)
    alone = min(len(asked), options.requests)
    with ServiceProcess("--keep", str(KEEP)) as service:
        used = service.cpu_seconds()
        before, first = load_service(service.url, asked, alone, 1)
        single_used = (service.cpu_seconds() - used) / alone
        settled, sizes = threading.Event(), []

        def look() -> None:
            settled.wait()
            sizes.append(service.rss())

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        used = service.cpu_seconds()
        together, replies = load_service(service.url, asked, options.requests, options.clients, settled)
        used = (service.cpu_seconds() - used) / options.requests
        settled.set()
        watcher.join()
        sizes.append(service.rss())
        after, last = load_service(service.url, asked, alone, 1)
        metrics = httpx.get(f"{service.url}/metrics").raise_for_status().text
        code = service.terminate()
    wrong = [(reply, expected) for reply, expected in first + replies + last if reply != expected]
    counted = f'codebook_requests_total{{endpoint="/v1/chat/completions",status="200"}} {2 * alone + len(replies)}.0'
    speed, single = options.requests / together, 2 * alone / (before + after)
    report = machine("cpu") | {
        "requests": options.requests,
        "clients": options.clients,
        "wrong": [repr(pair) for pair in wrong[:5]],
        "different": len(wrong),
        "counted": counted in metrics,
        "exit_code": code,
        "rss_mib": sizes,
        "requests_per_second": speed,
        "one_by_one_per_second": single,
        "speedup": speed / single,
        "cpu_seconds_per_request": used,
        "one_by_one_cpu_seconds_per_request": single_used,
    }
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(f"{options.requests} requests of {options.clients} clients: {len(wrong)} errors or other answers")
        for pair in report["wrong"]:
            print(f"  {pair}")
        print(f"memory: {sizes[0]:.0f} MiB after {SETTLED}, {sizes[1]:.0f} MiB after all")
        print(f"{speed:.1f} requests/s; one by one {single:.1f}: {speed / single:.2f} times as many")
        print(f"processor of the service: {1000 * used:.0f} ms per request, one by one {1000 * single_used:.0f}")
        print(f"counted right: {counted in metrics}; exit code after SIGTERM: {code}")
    if wrong or code or counted not in metrics:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
