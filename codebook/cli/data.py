"""Samples by the names that the command line gives them: `miniature` is known here, and not in the library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from codebook.evaluation.datasets import load_tasks
from codebook.evaluation.metrics import Task
from codebook.inference.frames import frame_rule_of
from codebook.inference.samples import Sample, read_samples
from codebook.miniature import TASK_FAMILIES
from codebook.miniature.samples import of_miniature

MINIATURE = "miniature"
"""Name of the embedded model's own samples."""


def load_samples(model: str, name: str, split: str = "train", seed: int = 0, count: int = 50) -> list[Sample]:
    """The embedded model's samples, or those of a JSONL file; `split`, `seed` and `count` go with the former.

    The frames of clips in a file are those that `model` is shown.
    """
    return of_miniature(split, seed, count) if name == MINIATURE else read_samples(Path(name), frame_rule_of(model))


def load_data(names: Sequence[str], count: int | None = None, seed: int = 0, model: str = MINIATURE) -> list[Task]:
    """The tasks of `load_tasks`, and of `miniature`, its test split, or `miniature:family`, one of its families.

    The frames of clips are those that `model` is shown.
    """
    return load_tasks(names, count, seed, {MINIATURE: _held_out}, frame_rule_of(model))


def _held_out(family: str, count: int | None, seed: int) -> list[Sample]:
    return of_miniature("test", seed, count or 100, [family] if family else TASK_FAMILIES)
