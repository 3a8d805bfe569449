"""Answers of a model to many samples in several ways, kept in a journal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codebook import models
from codebook.inference.ask import answer
from codebook.inference.journal import Journal
from codebook.inference.prompts import prepare
from codebook.inference.samples import Sample, digest
from codebook.pruning import Schedule, remember

BATCH = 32


Policy = Callable[[Sequence[Sample]], Schedule | None]
"""The schedule for a batch of samples; None leaves the model as it is."""


@dataclass(frozen=True)
class Said:
    """What a model answered to one sample.

    Attributes
    ----------
    text
    counts
        Visual tokens of all its images, unpruned and after each stage.
    """

    text: str
    counts: list[int]


Shard = tuple[int, int]
"""(i, n): the i-th of n parts of the work, counted from 1."""


def respond(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    plans: Mapping[str, Policy],
    file: Path | None = None,
    done: Callable[[int], None] = lambda count: None,
    *,
    blind: bool = False,
    batch: int = BATCH,
    max_new_tokens: int = 32,
    part: Shard | None = None,
) -> dict[str, list[Said]]:
    """Answer the same questions in several ways, encoding each image once where the family's tower allows it.

    Parameters
    ----------
    plans
        The ways. In a file they are known by their names: another way needs another name.
    file
        Where every finished batch is kept; called again, the work goes on, with further plans or samples if there are
        some. A file of another model is refused. What parts have kept beside it is not answered again.
    done
        Hears how many answers there are, of all plans.
    blind
        Leave the images out of the prompts: what the questions alone give away.
    batch, max_new_tokens
        Samples of a batch; the longest answer.
    part
        Answer only these of the batches, into a file of the part's own: several processes share the work, each with
        its part, and a call without `part` then finds all answers.

    Returns
    -------
    For each plan what was said to each sample, in the samples' order; of a part nothing, {}
    """
    about = {"model": models.identity(model), "max_new_tokens": max_new_tokens, "blind": blind}
    journal = _journal(file, about, part)
    answered, own, keys = 0, batches(samples, batch, part), []
    for rows in own:
        group = [samples[row] for row in rows]
        keys.append(key := digest(group))
        todo = {name: plan for name, plan in plans.items() if f"{name} #{key}" not in journal}
        done(answered := answered + len(group) * (len(plans) - len(todo)))
        if todo:
            images = [() if blind else sample.pictures() for sample in group]
            prompts = prepare(model, processor, images, [sample.question for sample in group])
            with remembering(model):
                for name, plan in todo.items():
                    found = answer(model, processor, prompts, plan(group), max_new_tokens)
                    values = [[one.text, list(map(sum, zip(*one.counts, strict=True)))] for one in found]
                    journal.add(f"{name} #{key}", values)
                    done(answered := answered + len(group))
    if part is not None:
        return {}
    said: dict[str, dict[int, Said]] = {name: {} for name in plans}
    for rows, key in zip(own, keys, strict=True):
        for name in plans:
            said[name] |= {row: Said(*value) for row, value in zip(rows, journal[f"{name} #{key}"], strict=True)}
    return {name: [found[row] for row in range(len(samples))] for name, found in said.items()}


def _journal(file: Path | None, about: dict[str, Any], part: Shard | None) -> Journal:
    """The file's, or its part's, with what all others beside it hold."""
    if file is None:
        return Journal(None, about)
    own = file if part is None else file.with_stem(f"{file.stem}-{part[0]}-of-{part[1]}")
    every = {*file.parent.glob(f"{file.stem}-*-of-*{file.suffix}"), *([file] if file.exists() else [])}
    return Journal(own, about, sorted(every - {own}))


def remembering(model: Any) -> contextlib.AbstractContextManager[None]:
    """`codebook.remember`, or nothing where the family's tower takes all images in one row."""
    return remember(model) if models.family(model).tower_rows else contextlib.nullcontext()


def batches(samples: Sequence[Sample], size: int = BATCH, part: Shard | None = None) -> list[list[int]]:
    """Batches of one task and one number of images: little padding, and answers of about one length."""
    groups: dict[str, dict[int, list[int]]] = {}
    for row, sample in enumerate(samples):
        groups.setdefault(sample.task, {}).setdefault(len(sample.images), []).append(row)
    alike = [rows for own in groups.values() for _, rows in sorted(own.items())]
    found = [rows[start : start + size] for rows in alike for start in range(0, len(rows), size)]
    return found if part is None else found[part[0] - 1 :: part[1]]
