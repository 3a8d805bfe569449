"""What a row of a benchmark is compared with, on the same questions: the whole model, a rival, the gates, group A."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from codebook.evaluation.metrics import ACCURACY, Estimate, Task, estimate, estimates, mean_of, numbers_of_groups
from codebook.inference.respond import Response
from codebook.inference.uncertainty import NORMAL_QUANTILE, sums_by_image
from codebook.pruning.text import UNPRUNED

GATES = ("random", "downsample")
"""Rows that a method must not be below: what costs nothing to choose, and what costs no tokens to encode."""

DOWNSAMPLED = "downsample"
"""The row that tells group A."""

RIGHT_FROM = 0.5
"""Score from which an answer counts as right."""


@dataclass(frozen=True)
class Runs:
    """The answers of a row: one run per seed.

    Attributes
    ----------
    method, keep
        The row's.
    sums
        For each run and task the (groups, sums) of the task's metric.
    scores
        (samples,) float64: each sample's own score, averaged over the runs.
    """

    method: str
    keep: float
    sums: list[list[np.ndarray]]
    scores: np.ndarray

    def estimates(self, tasks: Sequence[Task]) -> list[list[Estimate]]:
        """All values of each task's metric, from sums averaged over the runs."""
        averaged = [np.mean(own, axis=0) for own in zip(*self.sums, strict=True)]
        return [estimates(task.metric, own) for task, own in zip(tasks, averaged, strict=True)]

    def scored(self, tasks: Sequence[Task]) -> list[Estimate]:
        """The score of each task."""
        return [every[0] for every in self.estimates(tasks)]


def gather_runs(tasks: Sequence[Task], method: str, keep: float, answers: Sequence[Sequence[Response]]) -> Runs:
    """The runs of a row, from the answers of each to the samples of all tasks, in their order."""
    samples = [sample for task in tasks for sample in task.samples]
    scores = [[sample.score(one.text) for sample, one in zip(samples, run, strict=True)] for run in answers]
    return Runs(method, keep, [_sums(tasks, run) for run in answers], np.mean(scores, axis=0))


def _sums(tasks: Sequence[Task], responses: Sequence[Response]) -> list[np.ndarray]:
    """The sums of each task's groups, from the answers to the samples of all tasks."""
    texts, start, found = [one.text for one in responses], 0, []
    for task in tasks:
        found.append(task.sums(texts[start : start + len(task.samples)]))
        start += len(task.samples)
    return found


def add_comparisons(
    results: list[dict[str, Any]], tasks: Sequence[Task], rows: Sequence[Runs], against: str | None
) -> None:
    """Add to each row its mean over the tasks, its differences from other rows, and its score on group A.

    Parameters
    ----------
    results
        The rows of results.json, the unpruned model's first; they get the keys `mean`, `against`, `gates`, `group_a`
        (docs/bench.md).
    rows
        The runs of the same rows.
    against
        Method that the others at its budget are compared with under `against`.
    """
    found, images = [row.scored(tasks) for row in rows], numbers_of_groups(tasks)
    at = {(row.method, row.keep): i for i, row in enumerate(rows)}
    full = mean_of(found[0])[0]
    for result, row, own in zip(results, rows, found, strict=True):
        value, error = mean_of(own, images)
        whole = _interval(value, error)
        bounded = None if whole is None else [max(0.0, whole[0]), min(1.0, whole[1])]
        result["mean"] = {"score": value, "interval": bounded, "relative": value / full if full else None}
        result["mean"] |= _apart(own, found[0], images)
        if len(row.sums) > 1:
            means = [mean_of(replace(row, sums=[run]).scored(tasks))[0] for run in row.sums]
            result["mean"]["spread"] = statistics.stdev(means)
        if row.method == UNPRUNED:
            continue
        if against != row.method and (against, row.keep) in at:
            rival = found[at[against, row.keep]]  # type: ignore[index]
            by_task = {task.name: _apart([a], [b]) for task, a, b in zip(tasks, own, rival, strict=True)}
            result["against"] = _apart(own, rival, images) | {"tasks": by_task}
        gates = [gate for gate in GATES if gate != row.method and (gate, row.keep) in at]
        result["gates"] = {gate: _apart(own, found[at[gate, row.keep]], images) for gate in gates}
        if (DOWNSAMPLED, row.keep) in at:
            chosen = group_a(rows[0], rows[at[DOWNSAMPLED, row.keep]])
            result["group_a"] = _on_group(tasks, row.scores, chosen, images)


def group_a(full: Runs, downsampled: Runs) -> np.ndarray:
    """(samples,) bool: those that the unpruned model answers right and downsampling fails (arXiv 2510.07143).

    Questions that a smaller picture answers as well say nothing about which tokens to keep. Right is a score of at
    least `RIGHT_FROM`.
    """
    return (full.scores >= RIGHT_FROM) & (downsampled.scores < RIGHT_FROM)


def _on_group(
    tasks: Sequence[Task], scores: np.ndarray, chosen: np.ndarray, images: Sequence[np.ndarray]
) -> dict[str, Any]:
    """The mean of the samples' scores on a group of them, all tasks together and task by task."""
    found, start = dict[str, tuple[np.ndarray, np.ndarray]](), 0
    for task, own in zip(tasks, images, strict=True):
        # Sum of the scores and number of the chosen samples, image by image.
        rows = [[start + row for row in group if chosen[start + row]] for group in task.groups]
        sums = np.array([(scores[group].sum(), len(group)) for group in rows], dtype=float)
        found[task.name] = sums[sums[:, 1] > 0], own[sums[:, 1] > 0]
        start += len(task.samples)
    every, numbers = (np.concatenate(parts) for parts in zip(*found.values(), strict=True))
    by_task = {name: _mean_share(sums) for name, (sums, _) in found.items() if len(sums)}
    return _mean_share(sums_by_image(every, numbers)[0] if len(every) else every) | {"tasks": by_task}


def _mean_share(sums: np.ndarray) -> dict[str, Any]:
    if not len(sums):
        return {"score": None, "interval": None, "samples": 0}
    found = estimate(ACCURACY, sums)
    return {"score": found.value, "interval": found.interval, "samples": int(sums[:, 1].sum())}


def _apart(
    own: Sequence[Estimate], other: Sequence[Estimate], images: Sequence[np.ndarray] | None = None
) -> dict[str, Any]:
    """The paired difference of the means over tasks, and its interval."""
    value, error = mean_of([a - b for a, b in zip(own, other, strict=True)], images)
    return {"change": value, "change_interval": _interval(value, error)}


def _interval(value: float, error: float | None) -> list[float] | None:
    return None if error is None else [value - NORMAL_QUANTILE * error, value + NORMAL_QUANTILE * error]
