"""Answers of a model to many samples under several policies, kept in a journal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from codebook import models
from codebook.errors import CodebookError
from codebook.inference.ask import Answer, answer_prompts
from codebook.inference.conversation import answer_sample
from codebook.inference.prompts import check_samples, prepare
from codebook.inference.records import read_record
from codebook.inference.samples import Sample, samples_digest
from codebook.models.base import Model, Processor
from codebook.pruning import Schedule, remember
from codebook.store.journal import Journal

BATCH_SIZE = 32
"""Samples per batch of answers."""

Policy = Callable[[Sequence[Sample]], Schedule | None]
"""The schedule for a batch of samples; None leaves the model as it is."""

Shard = tuple[int, int]
"""(i, n): the i-th of n equal parts of the batches, counted from 1."""


RESPONSES = TypeAdapter(list[tuple[str, list[int]]])
"""A batch of responses in the journal."""


@dataclass(frozen=True)
class Response:
    """The answer of a model to one sample.

    Attributes
    ----------
    text
        The answer.
    counts
        Visual tokens of all the sample's images together: unpruned, then after each stage.
    """

    text: str
    counts: list[int]


def respond(
    model: Model,
    processor: Processor,
    samples: Sequence[Sample],
    policies: Mapping[str, Policy],
    file: Path | None = None,
    done: Callable[[int], None] = lambda count: None,
    *,
    blind: bool = False,
    batch: int = BATCH_SIZE,
    max_new_tokens: int = 32,
    shard: Shard | None = None,
    stopped: dict[str, str] | None = None,
) -> dict[str, list[Response]]:
    """Answer the same questions under several policies, encoding each image once where the family's tower allows it.

    Parameters
    ----------
    policies
        By name. The journal knows a policy by its name only: another policy needs another name.
    file
        Journal of the finished batches: called again, the work goes on, also with more policies or samples. A file of
        another model is refused. Batches that other shards have journalled beside it are not answered again.
    done
        Called with the number of answers so far, over all policies.
    blind
        Leave the images out of the prompts, and earlier questions, to see what the questions alone give away.
    batch, max_new_tokens
        Samples per batch; most tokens per answer.
    shard
        Answer only these of the batches, into a journal of the shard's own: several processes share the work, and a
        call without `shard` then finds all answers.
    stopped
        Filled with the policies whose schedules refuse a batch, and why: no more is answered under them, and the others
        go on. None: that error is raised, as is any of the model as it is.

    Returns
    -------
    For each policy that answered all one Response per sample, in the samples' order; {} for a shard
    """
    model = models.unwrap(model)
    check_samples(model, processor, samples)
    about = models.identities(model, processor) | {"max_new_tokens": max_new_tokens, "blind": blind}
    answered, own_batches, keys = 0, batches(samples, batch, shard), []
    over: dict[str, str] = {} if stopped is None else stopped
    with _open_journal(file, about, shard) as journal:
        for rows in own_batches:
            group = [samples[row] for row in rows]
            keys.append(key := samples_digest(group))
            todo = [name for name in policies if name not in over and f"{name} #{key}" not in journal]
            done(answered := answered + len(group) * (len(policies) - len(todo)))
            if todo:
                answering = _answering(model, processor, group, max_new_tokens, blind)
                with remembering(model):
                    for name in todo:
                        schedule = policies[name](group)
                        try:
                            answers = answering(schedule or Schedule([]))
                        except CodebookError as error:
                            if stopped is None or schedule is None:
                                raise
                            over[name] = str(error)
                        else:
                            # A sample's counts are the sums over its images, stage by stage.
                            values = [[a.text, list(map(sum, zip(*a.counts, strict=True)))] for a in answers]
                            journal.add(f"{name} #{key}", values)
                        done(answered := answered + len(group))
    if shard is not None:
        return {}
    responses: dict[str, dict[int, Response]] = {name: {} for name in policies if name not in over}
    for rows, key in zip(own_batches, keys, strict=True):
        for name in responses:
            answered_batch = read_record(journal, f"{name} #{key}", RESPONSES, len(rows))
            responses[name] |= {row: Response(*one) for row, one in zip(rows, answered_batch, strict=True)}
    return {name: [by_row[row] for row in range(len(samples))] for name, by_row in responses.items()}


def _answering(
    model: Model, processor: Processor, group: Sequence[Sample], max_new_tokens: int, blind: bool
) -> Callable[[Schedule], list[Answer]]:
    """A function that answers a batch under a schedule: at once, or, in conversations, one by one."""
    if not blind and any(sample.earlier for sample in group):
        return lambda schedule: [answer_sample(model, processor, own, schedule, max_new_tokens) for own in group]
    images = [() if blind else sample.pictures() for sample in group]
    prompts = prepare(model, processor, images, [sample.question for sample in group])
    return lambda schedule: answer_prompts(model, processor, prompts, schedule, max_new_tokens)


def _open_journal(file: Path | None, about: dict[str, Any], shard: Shard | None) -> Journal:
    """The journal of a file, or of its shard, which also knows the records of all others beside it."""
    if file is None:
        return Journal(None, about)
    own = file if shard is None else file.with_stem(f"{file.stem}-{shard[0]}-of-{shard[1]}")
    parts = f"{file.stem}-*-of-*"  # those of an earlier version too, which the journal refuses by name
    every = {*file.parent.glob(parts + file.suffix), *file.parent.glob(parts + ".jsonl")}
    every |= {file} if file.exists() else set()
    return Journal(own, about, sorted(every - {own}))


def remembering(model: Model) -> contextlib.AbstractContextManager[None]:
    """`codebook.remember`, or an empty context where the family's tower takes all images in one row."""
    return remember(model) if models.family(model).tower_rows else contextlib.nullcontext()


def batches(samples: Sequence[Sample], size: int = BATCH_SIZE, shard: Shard | None = None) -> list[list[int]]:
    """Rows of the samples, in batches of one task and one number of images: little padding, answers of like length."""
    groups: dict[str, dict[int, list[int]]] = {}
    for row, sample in enumerate(samples):
        groups.setdefault(sample.task, {}).setdefault(len(sample.images), []).append(row)
    alike = [rows for by_images in groups.values() for _, rows in sorted(by_images.items())]
    cut = [rows[start : start + size] for rows in alike for start in range(0, len(rows), size)]
    return cut if shard is None else cut[shard[0] - 1 :: shard[1]]
