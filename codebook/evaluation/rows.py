"""The rows of a benchmark: every method at every budget, as schedules; and why some are impossible."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from codebook import models
from codebook.errors import CodebookError
from codebook.models.base import Model
from codebook.pruning import Downsample, Random, Schedule
from codebook.pruning.deep import deep_layer
from codebook.pruning.ownership import codebooks_of, prototypes_digest
from codebook.pruning.presets import needs_codebook
from codebook.pruning.text import UNPRUNED
from codebook.store.codebook import Codebook
from codebook.store.shipped import find_codebook

BASELINES = ("random", "uniform", "downsample")
"""Methods that are always among the rows, beside the unpruned model: a method that does not beat them is not needed."""

NEAR = 0.01
"""Largest distance between a schedule of counts and the budget that it is measured at."""


@dataclass(frozen=True)
class Row:
    """A method at a budget.

    Attributes
    ----------
    method
        The user's text for it.
    keep
        The budget: visual tokens averaged over the decoder's layers, as a fraction of the unpruned count.
    schedules
        One schedule, or one per seed for methods that draw at random; (None,) for the unpruned model.
    """

    method: str
    keep: float
    schedules: tuple[Schedule | None, ...]

    @property
    def name(self) -> str:
        """Method and budget, as notes and journals name the row."""
        return self.method if self.schedules == (None,) else f"{self.method} {self.keep:g}"


def plan(
    model: Model,
    methods: Sequence[str],
    keeps: Sequence[float],
    codebook: Codebook | Path | None = None,
    seeds: Sequence[int] = (0,),
) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of a benchmark, `unpruned` first, then budget by budget; and the impossible ones, each with its reason.

    What is left out is also logged, here and by `measure`, as soon as it is known: before the work, if it can be.

    Parameters
    ----------
    methods
        Methods in the text form of schedules; BASELINES are added.
    codebook
        Prototypes for methods that need them, or their folder; default: the model's own.
    seeds
        Seeds of methods that draw at random.
    """
    the_codebook = functools.cache(lambda: find_codebook(model, codebook))  # once, and only if a method needs it
    found, skipped = [Row(UNPRUNED, 1.0, (None,))], []
    for keep in keeps:
        made: list[Row] = []
        for method in dict.fromkeys((*methods, *BASELINES)):
            try:
                own = the_codebook() if needs_codebook(method) else None
                made.append(row_of(model, method, keep, own, seeds, deep_layer(model, method, True, codebook)))
            except CodebookError as error:
                skipped.append(left_out(method, keep, str(error)))
        different, others = distinct(made)
        found, skipped = found + different, skipped + others
    return found, skipped


def distinct(rows: Sequence[Row]) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of a budget without those that prune the same as another, being spelt another way; and these, left out.

    A baseline keeps its own name, by which others are compared with it; else the name that comes first stays.
    """
    keys = [tuple(map(schedule_key, row.schedules)) for row in rows]
    names: dict[tuple[str, ...], str] = {}
    for row, key in sorted(zip(rows, keys, strict=True), key=lambda pair: pair[0].method not in BASELINES):
        names.setdefault(key, row.method)
    left = [
        left_out(row.method, row.keep, f"it is the same as {names[key]}: {row.schedules[0]}")
        for row, key in zip(rows, keys, strict=True)
        if names[key] != row.method
    ]
    return [row for row, key in zip(rows, keys, strict=True) if names[key] == row.method], left


def row_of(
    model: Model,
    method: str,
    keep: float,
    codebook: Codebook | None,
    seeds: Sequence[int],
    horizon: int | None = None,
) -> Row:
    """One row of `plan`: a method at a budget; `horizon` is the layer that `deep_layer` found for it.

    Raises
    ------
    CodebookError
        If the budget cannot be met.
    """
    rows, cols = models.family(model).grid(model)
    schedule = _fitted(method, codebook, rows * cols, models.shape(model).layers, keep, horizon)
    schedule = _shrunk(schedule, rows, cols).shares(rows * cols)
    return Row(method, keep, tuple(reseeded(schedule, seeds)))


def _fitted(method: str, codebook: Codebook | None, n: int, layers: int, keep: float, horizon: int | None) -> Schedule:
    schedule, _ = Schedule.draft(method, codebook, layers=layers, horizon=horizon, budget=keep)
    counts = [stage.keep for stage in schedule.stages if isinstance(stage.keep, int)]
    if len(counts) < len(schedule.stages) or counts == [0]:  # a single drop moves its layer
        return schedule.fit(keep, n=n, layers=layers)
    if abs((own := schedule.budget(n, layers)) - keep) > NEAR:
        raise CodebookError(f"'{schedule}' says its counts, and they are a budget of {own:.3f}: give that to --keep")
    return schedule


def reseeded(schedule: Schedule, seeds: Sequence[int]) -> Iterator[Schedule]:
    """The schedule once per seed of its stages that draw at random; once as it is, if no stage does."""
    if not any(isinstance(stage.pruner, Random) for stage in schedule.stages):
        yield schedule
        return
    for seed in seeds:
        stages = [replace(s, pruner=Random(seed)) if isinstance(s.pruner, Random) else s for s in schedule.stages]
        yield replace(schedule, stages=stages)


def _shrunk(schedule: Schedule, rows: int, cols: int) -> Schedule:
    """The schedule with the count of `downsample` lowered to the next rows x columns that images can be resized to."""
    stages = list(schedule.stages)
    if stages and isinstance(stages[0].pruner, Downsample):
        wanted = stages[0].count(rows * cols)
        whole = {r * c for r in range(1, rows + 1) for c in range(1, cols + 1)}
        stages[0] = replace(stages[0], keep=max(count for count in whole if count <= wanted))
    return replace(schedule, stages=stages)


def schedule_key(schedule: Schedule | None) -> str:
    """Name of a schedule in journals: its text, and a short hash of the codebook, which the text does not name."""
    if schedule is None:
        return UNPRUNED
    books = [book for stage in schedule.stages for book in codebooks_of(stage.pruner)]
    return " ".join([str(schedule), *(f"{prototypes_digest(book) % 2**32:08x}" for book in books)])


def left_out(method: str, keep: float, reason: str) -> dict[str, Any]:
    """The entry of a row that is impossible, which is also logged."""
    logging.getLogger(__name__).warning("left out: %s at %g: %s", method, keep, reason)
    return {"method": method, "keep": keep, "reason": reason}
