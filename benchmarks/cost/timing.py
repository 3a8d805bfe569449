"""Timing side by side, and the command line of benchmarks that do nothing else.

Every round runs all tasks once, so other load on the machine falls on all of them alike, as in `codebook bench`.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from codebook.evaluation.timing import machine, quartiles
from codebook.store.files import write_text

__all__ = ["Report", "clocked", "device_seconds", "interleaved", "machine", "measured", "quartiles"]


def measured(doc: str | None, compare: Callable[[float, str], list[dict[str, Any]]]) -> dict[str, Any] | None:
    """What `compare(seconds, device)` found, and on which machine; None where it was printed as JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of rounds; at least 3 are made and at most 25")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    report = machine(options.device) | {"rows": compare(options.seconds, options.device)}
    if options.json:
        print(json.dumps(report, indent=1))
        return None
    return report


class Report:
    """What was measured so far, in a file after every row, so that a run that is cut short keeps it.

    Parameters
    ----------
    path
        A JSON file. What is in it already stays: the parts of a benchmark may run in processes of their own.
    seconds
        From now until no further row is begun.
    """

    def __init__(self, path: Path, device: str, seconds: float) -> None:
        self.path, self._end = path, time.monotonic() + seconds
        self.content = json.loads(path.read_text()) if path.exists() else machine(device) | {"rows": []}

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def put(self, row: dict[str, Any], **values: Any) -> None:
        """Write down `values` of a `row`, which its own entries name, in place of those that it had."""
        rows = self.content["rows"]
        known = next((i for i, old in enumerate(rows) if row.items() <= old.items()), len(rows))
        rows[known : known + 1] = [row | values]
        write_text(self.path, as_text(self.content))


def as_text(content: dict[str, Any]) -> str:
    """JSON with one row per line, numbers to the nanosecond."""
    short = json.loads(json.dumps(content), parse_float=lambda number: round(float(number), 9))
    rows = ",\n".join(json.dumps(row) for row in short.pop("rows"))
    return f'{json.dumps(short)[:-1]}, "rows": [\n{rows}\n]}}\n'


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(tasks: dict[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds of each task in each round, after a warm-up: 3 to 25 rounds, as many as can start within `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        clocked(task, device)
    start = time.perf_counter()
    for done in range(25):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, task in tasks.items():
            times[name].append(clocked(task, device)[0])
    return times


def clocked(task: Callable[[], Any], device: str) -> tuple[float, float, Any]:
    """Seconds until the device has done the task, seconds until the host has said all of it, and what it returns."""
    synchronize(device)
    start = time.perf_counter()
    result = task()
    said = time.perf_counter() - start
    synchronize(device)
    return time.perf_counter() - start, said, result


def device_seconds(task: Callable[[], Any], host: float) -> float:
    """Seconds that the device alone takes for a task that the host needs `host` seconds to say.

    By CUDA's events. The device is put to sleep first, so that it finds all work in its queue. Of a task of more than
    about a thousand kernels, which the queue does not hold, this is at most what is returned.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(_cycles() * min(0.1, 1.5 * host + 1e-4)))
    start.record()
    task()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _cycles() -> float:
    """Cycles per second of the clock that `torch.cuda._sleep` counts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        start.record()
        torch.cuda._sleep(20_000_000)
        end.record()
        torch.cuda.synchronize()
    return 20_000_000 / (start.elapsed_time(end) / 1e3)
