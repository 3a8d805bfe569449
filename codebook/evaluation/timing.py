"""Timing side by side: every round runs all tasks once, so other load on the machine falls on all of them alike."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def interleaved(tasks: dict[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds of each task in each round, after a warm-up: 3 to 25 rounds, as many as can start within `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        _time(task, device)
    start = time.perf_counter()
    for done in range(25):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, task in tasks.items():
            times[name].append(_time(task, device))
    return times


def _time(task: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    task()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quartiles(values: list[float]) -> dict[str, Any]:
    """First quartile `q1`, `median` and third quartile `q3`, and how many `rounds` they are from.

    One round shows no spread: its quartiles are None.
    """
    if len(values) < 2:
        return {"q1": None, "median": values[0], "q3": None, "rounds": len(values)}
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": first, "median": median, "q3": third, "rounds": len(values)}


def machine(device: str) -> dict[str, Any]:
    """Name of the processor or GPU, number of threads, and version of torch."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    return {"machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
