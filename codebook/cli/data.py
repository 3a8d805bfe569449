"""Samples by the names that the command line gives them: `miniature` is known here, and not in the library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image as Picture

from codebook.cli.output import progress
from codebook.errors import CodebookError, quoted, unknown
from codebook.evaluation.datasets import load_tasks
from codebook.evaluation.metrics import Task
from codebook.inference.samples import Sample, read_samples
from codebook.miniature import TASK_FAMILIES
from codebook.miniature.samples import of_miniature, of_turns
from codebook.models.finite import some
from codebook.store.clips import FrameRule
from codebook.store.pictures import even_frames
from codebook.store.reading import is_file

MINIATURE = "miniature"
"""Name of the embedded model's own samples."""
TURNS = "turns"
"""Name, behind that, of its questions about a picture that another question has pruned."""


def is_miniature(name: str) -> bool:
    """Whether a name means the embedded model's own samples: `miniature`, or one family's, as in `miniature:ocr`."""
    return name.partition(":")[0] == MINIATURE


def load_samples(
    name: str,
    rule: FrameRule = even_frames,
    split: str | None = None,
    seed: int = 0,
    count: int | None = None,
    usual: int = 50,
) -> list[Sample]:
    """The samples of `miniature`, of `miniature:family`, or of a JSONL file; every picture of it can be read.

    Parameters
    ----------
    rule
        Chooses the frames of clips in a file: `Loading.frame_rule` of the model that is shown them.
    split, seed, count
        Which of the embedded model's samples, and how many per task family; None: `train`, and `usual`. A file is taken
        whole, so that these are refused beside it.
    """
    if is_miniature(name):
        samples = _own_samples(split or "train", name.partition(":")[2], count or usual, seed)
    elif chosen := [option for option, value in (("--split", split), ("--count", count)) if value is not None]:
        raise CodebookError(f"{chosen[0]} is for the miniature's samples, and a file is taken whole: leave it out")
    elif is_file(Path(name)):
        samples = read_samples(Path(name), rule)
    else:
        raise unknown("no data", name, [MINIATURE], f"give {MINIATURE}, {MINIATURE}:FAMILY, or a JSONL file")
    if any(sample.earlier for sample in samples):
        raise CodebookError(f"{name} has earlier questions, which `codebook bench` alone asks: leave them out")
    _check_pictures(samples)
    return samples


def load_data(
    names: Sequence[str], count: int | None = None, seed: int = 0, rule: FrameRule = even_frames
) -> list[Task]:
    """The tasks of `load_tasks`, and of `miniature`, its test split, `miniature:family` or `miniature:turns`.

    Every picture of them can be read; clips are decoded when they are asked about.
    """
    tasks = load_tasks(names, count, seed, {MINIATURE: _held_out}, rule)
    _check_pictures([sample for task in tasks for sample in task.samples])
    return tasks


def _held_out(family: str, count: int | None, seed: int) -> list[Sample]:
    return _own_samples("test", family, count or 100, seed)


def _own_samples(split: str, family: str, count: int, seed: int) -> list[Sample]:
    if family == TURNS:
        return of_turns(split, seed, count)
    return of_miniature(split, seed, count, [family] if family else TASK_FAMILIES)


def _check_pictures(samples: Sequence[Sample]) -> None:
    """Refuse pictures that break off or are damaged, all of them by name, before a model is loaded.

    Only decoding the whole of a picture shows that. It takes milliseconds, and the model will take far longer.
    """
    shown = {
        image: sample
        for sample in samples
        if sample.clip is None
        for image in sample.images
        if not isinstance(image, Picture.Image)
    }
    if not shown:
        return
    wrong: list[tuple[str, CodebookError]] = []
    with progress("pictures", len(shown), "pictures") as tick:
        for done, (image, sample) in enumerate(shown.items(), 1):
            try:
                sample.read(image)
            except CodebookError as error:
                name = str(image) if isinstance(image, Path) else f"that of {quoted(sample.question)}"
                wrong.append((name, error))
            tick(done)
    if wrong:
        names, errors = zip(*wrong, strict=True)
        more = f"{len(wrong)} pictures cannot be read, {some(list(names))}: " if len(wrong) > 1 else ""
        raise CodebookError(f"{more}{errors[0]}, or leave the questions about it out")
