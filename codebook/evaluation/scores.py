"""Scores of a model's answers to questions with known answers, under one schedule or several policies."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from codebook.inference.respond import Policy, Response, respond
from codebook.inference.samples import Sample
from codebook.models.base import Model, Processor
from codebook.pruning import Schedule

Scores = dict[str, list[float]]
"""For each task the scores of its samples, from 0 to 1."""


def compare(
    model: Model,
    processor: Processor,
    samples: Sequence[Sample],
    plans: Mapping[str, Policy],
    file: Path | None = None,
    done: Callable[[int], None] = lambda count: None,
    *,
    blind: bool = False,
) -> dict[str, Scores]:
    """The scores of the answers that `respond` gives, for each policy."""
    said = respond(model, processor, samples, plans, file, done, blind=blind)
    return {name: scored(samples, own) for name, own in said.items()}


def scored(samples: Sequence[Sample], said: Sequence[Response]) -> Scores:
    """The scores of the responses to the samples, by task."""
    scores: Scores = {}
    for sample, one in zip(samples, said, strict=True):
        scores.setdefault(sample.task, []).append(sample.score(one.text))
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
    return {task: statistics.fmean(values) for task, values in scores.items()}


def mean(scores: Scores) -> float:
    """Mean accuracy over the tasks."""
    return statistics.fmean(task_means(scores).values())


def standard_error(scores: Scores) -> float:
    """Standard error of that mean, from the spread of the questions within each task."""
    variances = [statistics.pvariance(values) / len(values) for values in scores.values()]
    return float(sum(variances) ** 0.5 / len(variances))


def accuracy_table(rows: Mapping[str, Scores]) -> str:
    """A Markdown table in percent: one row per policy, one column per task, and the mean with its standard error."""
    tasks = next(iter(rows.values()))
    lines = [f"| | {' | '.join(tasks)} | mean |", f"|---|{'---|' * (len(tasks) + 1)}"]
    for name, scores in rows.items():
        cells = [f"{100 * value:.1f}" for value in task_means(scores).values()]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {100 * mean(scores):.1f} ± {100 * standard_error(scores):.1f} |"
        )
    return "\n".join(lines)
