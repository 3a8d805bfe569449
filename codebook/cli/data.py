"""Samples by the names that the command line gives them: `miniature` is known here, and not in the library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from codebook.errors import CodebookError
from codebook.evaluation.datasets import load_tasks
from codebook.evaluation.metrics import Task
from codebook.inference.samples import Sample, read_samples
from codebook.miniature import TASK_FAMILIES
from codebook.miniature.samples import of_miniature, of_turns
from codebook.store.clips import FrameRule
from codebook.store.pictures import even_frames

MINIATURE = "miniature"
"""Name of the embedded model's own samples."""
TURNS = "turns"
"""Name, behind that, of its questions about a picture that another question has pruned."""


def load_samples(
    name: str, rule: FrameRule = even_frames, split: str = "train", seed: int = 0, count: int = 50
) -> list[Sample]:
    """The embedded model's samples, or those of a JSONL file.

    Parameters
    ----------
    rule
        Chooses the frames of clips in a file: `Loading.frame_rule` of the model that is shown them.
    split, seed, count
        Which of the embedded model's samples.
    """
    if name == MINIATURE:
        return of_miniature(split, seed, count)
    samples = read_samples(Path(name), rule)
    if any(sample.earlier for sample in samples):
        raise CodebookError(f"{name} has earlier questions, which `codebook bench` alone asks: leave them out")
    return samples


def load_data(
    names: Sequence[str], count: int | None = None, seed: int = 0, rule: FrameRule = even_frames
) -> list[Task]:
    """The tasks of `load_tasks`, and of `miniature`, its test split, `miniature:family` or `miniature:turns`."""
    return load_tasks(names, count, seed, {MINIATURE: _held_out}, rule)


def _held_out(family: str, count: int | None, seed: int) -> list[Sample]:
    if family == TURNS:
        return of_turns("test", seed, count or 100)
    return of_miniature("test", seed, count or 100, [family] if family else TASK_FAMILIES)
