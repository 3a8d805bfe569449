"""Samples by the name that the command line gives them."""

from __future__ import annotations

from pathlib import Path

from codebook.inference.samples import Sample, read
from codebook.miniature.samples import of_miniature

MINIATURE = "miniature"


def load(name: str, split: str = "train", seed: int = 0, count: int = 50) -> list[Sample]:
    """`miniature`, or the JSONL file of that name; `split`, `seed` and `count` are the miniature's."""
    return of_miniature(split, seed, count) if name == MINIATURE else read(Path(name))
