"""Timing side by side, as `codebook bench` does it, and the command line of benchmarks that do nothing else."""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from codebook.evaluation.timing import interleaved, machine, quartiles

__all__ = ["interleaved", "machine", "measured", "quartiles"]


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
