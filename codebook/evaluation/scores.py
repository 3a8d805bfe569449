"""Scores of a model's answers to questions with known answers, under one schedule or several policies."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from codebook.inference.respond import Policy, Response, respond
from codebook.inference.samples import Sample, image_numbers
from codebook.inference.uncertainty import UNKNOWN, deviation, error_over_tasks
from codebook.models.base import Model, Processor
from codebook.pruning import Schedule


@dataclass(frozen=True)
class TaskScores:
    """Scores of a task's answers.

    Attributes
    ----------
    values
        Score of each sample, from 0 to 1.
    images
        Number of the image of each sample, the same in all tasks: those about one are no independent draws.
    """

    values: list[float] = field(default_factory=list)
    images: list[int] = field(default_factory=list)


Scores = dict[str, TaskScores]
"""The scores of each task."""


def compare(
    model: Model,
    processor: Processor,
    samples: Sequence[Sample],
    policies: Mapping[str, Policy],
    file: Path | None = None,
    done: Callable[[int], None] = lambda count: None,
    *,
    blind: bool = False,
) -> dict[str, Scores]:
    """The scores of the answers that `respond` gives, for each policy."""
    responses = respond(model, processor, samples, policies, file, done, blind=blind)
    return {name: scored(samples, own) for name, own in responses.items()}


def scored(samples: Sequence[Sample], responses: Sequence[Response]) -> Scores:
    """The scores of the responses to the samples, by task."""
    scores: Scores = {}
    for sample, one, image in zip(samples, responses, image_numbers(samples), strict=True):
        own = scores.setdefault(sample.task, TaskScores())
        own.values.append(sample.score(one.text))
        own.images.append(image)
    return scores


def evaluate(
    model: Model,
    processor: Processor,
    samples: Sequence[Sample],
    schedule: Schedule | None = None,
    done: Callable[[int], None] = lambda count: None,
    *,
    blind: bool = False,
) -> Scores:
    """Answer the questions under a schedule, or as the model is, and score them; see `respond`."""
    [scores] = compare(model, processor, samples, {"": lambda asked: schedule}, done=done, blind=blind).values()
    return scores


def task_means(scores: Scores) -> dict[str, float]:
    """Mean accuracy of each task."""
    return {task: statistics.fmean(own.values) for task, own in scores.items()}


def mean(scores: Scores) -> float:
    """Mean accuracy over the tasks."""
    return statistics.fmean(task_means(scores).values())


def standard_error(scores: Scores) -> float | None:
    """Standard error of that mean, from the spread of the images within each task.

    None where a task has a single image, which shows no spread; see `error_over_tasks`.
    """
    return error_over_tasks([deviation(np.array(own.values), own.images) for own in scores.values()])


def mean_text(scores: Scores) -> str:
    """Mean accuracy with its standard error, for people: `0.912 (0.011)`, or `0.912 (unknown)`."""
    return _mean_text(1, scores, 3)


def _mean_text(scale: float, scores: Scores, digits: int) -> str:
    error = standard_error(scores)
    shown = UNKNOWN if error is None else format(scale * error, f".{digits}f")
    return f"{scale * mean(scores):.{digits}f} ({shown})"


def accuracy_table(rows: Mapping[str, Scores]) -> str:
    """A Markdown table in percent: one row per policy, one column per task, and the mean with its standard error."""
    tasks = next(iter(rows.values()))
    lines = [f"| | {' | '.join(tasks)} | mean (standard error) |", f"|---|{'---|' * (len(tasks) + 1)}"]
    for name, scores in rows.items():
        cells = [f"{100 * value:.1f}" for value in task_means(scores).values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {_mean_text(100, scores, 1)} |")
    return "\n".join(lines)
