"""What a measurement of time is reported with: its quartiles, and the machine."""

import platform
import statistics
from pathlib import Path
from typing import Any

import torch


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
