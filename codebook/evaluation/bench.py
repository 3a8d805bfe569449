"""One benchmark: every method at equal budgets, what it gets right and what it costs (docs/bench.md)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codebook import __version__, models
from codebook.errors import CodebookError
from codebook.evaluation.comparisons import Runs, add_comparisons, gather_runs
from codebook.evaluation.costs import measure_costs
from codebook.evaluation.latency import Clock, TimedPrompt
from codebook.evaluation.metrics import Task
from codebook.evaluation.rows import Row, left_out, schedule_key
from codebook.evaluation.timing import machine
from codebook.inference.prompts import check_samples
from codebook.inference.respond import Policy, Response, Shard, batches, respond
from codebook.inference.samples import Sample
from codebook.models.base import Model, Processor, attention_kernel
from codebook.pruning import Schedule, Stage, Uniform

RESULTS_FORMAT = 1
"""Version of the layout of results.json."""


@dataclass(frozen=True)
class BenchSettings:
    """How `measure` measures.

    Attributes
    ----------
    seed
        Seed of the data, of random methods and of the order of timings.
    batch, max_new_tokens
        Samples per batch of answers; most tokens per answer.
    seconds
        Seconds to spend on timing; at least three rounds are run.
    against
        One of the rows' methods: at each budget all rows are compared with it, as they are with the unpruned model.
    batches
        Sizes of the batches whose answers per second are measured.
    """

    seed: int = 0
    batch: int = 32
    max_new_tokens: int = 32
    seconds: float = 120.0
    against: str | None = None
    batches: tuple[int, ...] = ()


def measure(
    model: Model,
    processor: Processor,
    tasks: Sequence[Task],
    rows: Sequence[Row],
    out: Path,
    settings: BenchSettings | None = None,
    done: Callable[[int, str], None] = lambda count, note: None,
    shard: Shard | None = None,
) -> dict[str, Any]:
    """Measure all rows: first the answers, then, separately, time and memory of one prompt.

    Parameters
    ----------
    out
        Folder of the journals. Called again, nothing in them is repeated, and added rows and samples are measured.
    done
        Called with the number of answers so far, out of `count_answers(tasks, rows, settings, shard)`, those of rows
        that are refused among them, and with a note on the current work.
    shard
        Only answer this part of the batches, into a journal of its own. Shards (1, n) to (n, n) may run at once, on
        several devices, but each in one process only; a call without `shard` then finds their answers in the folder.

    Returns
    -------
    The contents of results.json without the samples shown, see docs/bench.md; for a shard only its `skipped`
    """
    model = models.unwrap(model)
    settings = settings or BenchSettings()
    samples = [sample for task in tasks for sample in task.samples]
    check_samples(model, processor, samples)
    timed = _prompt(samples)
    bench = TimedPrompt.of(model, processor, timed.pictures(), timed.question)
    films = timed.clip is None and any(one.clip or len(one.images) > len(timed.images) for one in samples)
    every = count_answers(tasks, rows, settings, shard)
    rows, refused = _possible(bench, rows, films)
    spared = every - count_answers(tasks, rows, settings, shard)  # those of rows that are refused
    plans: dict[str, Policy] = {}
    for row in rows:
        for schedule in row.schedules:
            plans[schedule_key(schedule)] = functools.partial(_constant, schedule)
    stopped: dict[str, str] = {}
    responses = respond(
        model, processor, samples, plans, out / "answers.sqlite", lambda count: done(spared + count, ""),
        batch=settings.batch, max_new_tokens=settings.max_new_tokens, shard=shard, stopped=stopped,
    )  # fmt: skip
    reasons = [[stopped[key] for key in map(schedule_key, row.schedules) if key in stopped] for row in rows]
    refused += [left_out(row.method, row.keep, own[0]) for row, own in zip(rows, reasons, strict=True) if own]
    if shard is not None:
        return {"skipped": refused}
    rows = [row for row, own in zip(rows, reasons, strict=True) if not own]
    costs = measure_costs(
        bench, rows, out, lambda note: done(every, note),
        seed=settings.seed, seconds=settings.seconds, sizes=settings.batches,
    )  # fmt: skip
    results, runs = [], []
    for row, cost in zip(rows, costs, strict=True):
        answers = [responses[schedule_key(schedule)] for schedule in row.schedules]
        runs.append(gather_runs(tasks, row.method, row.keep, answers))
        results.append(_result(model, bench, row, tasks, runs[-1], [one for run in answers for one in run], cost))
    add_comparisons(results, tasks, runs, settings.against)
    return {**_heading(bench, timed, tasks, settings), "rows": results, "skipped": refused}


def _heading(bench: TimedPrompt, timed: Sample, tasks: Sequence[Task], settings: BenchSettings) -> dict[str, Any]:
    """What results.json says of the measurement itself; `timed` is the sample of the timed prompt."""
    model, size = bench.model, models.shape(bench.model)
    return {
        "format": RESULTS_FORMAT,
        "version": __version__,
        "model": models.identity(model),
        "tokens": size.tokens,
        "layers": size.layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention_kernel(model),
        "seed": settings.seed,
        "against": settings.against,
        "batches": list(settings.batches),
        "tasks": {
            task.name: {
                "samples": len(task.samples),
                "groups": len(task.groups),
                "metrics": list(task.metric.names),
                "detail": list(task.metric.detail),
            }
            for task in tasks
        },
        "machine": machine(model.device.type) | {"device": model.device.type},
        "timed": {"question": timed.question, "task": timed.task, "prompt": int(bench.inputs["input_ids"].shape[1])},
    }


def count_answers(
    tasks: Sequence[Task], rows: Sequence[Row], settings: BenchSettings | None = None, shard: Shard | None = None
) -> int:
    """Number of answers that `measure` needs."""
    plans = {schedule_key(schedule) for row in rows for schedule in row.schedules}
    samples, settings = [sample for task in tasks for sample in task.samples], settings or BenchSettings()
    return len(plans) * sum(len(own) for own in batches(samples, settings.batch, shard))


def _constant(schedule: Schedule | None, asked: object) -> Schedule | None:
    return schedule


def _prompt(samples: Sequence[Sample]) -> Sample:
    """The sample that is timed: the first of those with the fewest images; a clip if there is nothing else."""
    return min(samples, key=lambda sample: (sample.clip is not None, len(sample.images)))


def _possible(bench: TimedPrompt, rows: Sequence[Row], films: bool) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows that the model accepts, and those that it refuses, with the reason. Trying each row also warms up.

    Each is tried as it will be timed: what cannot be timed is refused before anything is answered. With `films` other
    questions show more pictures than the one that is timed.
    """
    good, refused = [], []
    for row in rows:
        try:
            bench.generate(row.schedules[0], 1, clock=Clock(bench.model.device))
        except CodebookError as error:
            joint = films and any(stage.joint for stage in (row.schedules[0] or Schedule([])).stages)
            more = "; all rows are timed on a question with fewer pictures than others: bench films alone"
            refused.append(left_out(row.method, row.keep, f"{error}{more if joint else ''}"))
        else:
            good.append(row)
    return good, refused


def _result(
    model: Model,
    bench: TimedPrompt,
    row: Row,
    tasks: Sequence[Task],
    runs: Runs,
    responses: Sequence[Response],
    cost: dict[str, Any],
) -> dict[str, Any]:
    schedule = row.schedules[0]
    per_layer, keep = _kept_per_layer(model, schedule, responses)
    scores = {}
    for task, every in zip(tasks, runs.estimates(tasks), strict=True):
        scores[task.name] = {
            "score": every[0].value, "interval": every[0].interval,
            "metrics": {name: own.value for name, own in zip(task.metric.names, every, strict=True)},
            "intervals": {name: own.interval for name, own in zip(task.metric.names, every, strict=True)},
        }  # fmt: skip
    return {
        "method": row.method, "keep": row.keep, "schedule": str(schedule or Schedule([])), "seeds": len(row.schedules),
        "kept": {"average": keep, "layers": per_layer}, "tasks": scores,
        "cost": cost | {"flops": _flops(model, bench, schedule)},
    }  # fmt: skip


def _kept_per_layer(
    model: Model, schedule: Schedule | None, responses: Sequence[Response]
) -> tuple[list[float], float]:
    """Visual tokens per layer, averaged over the questions, and their average share of the unpruned count."""
    layers = models.shape(model).layers
    starts = [0, *(stage.layer for stage in (schedule.stages if schedule else ()))]
    stage_of = [max(i for i, start in enumerate(starts) if start <= layer) for layer in range(layers)]
    counts = np.array([[one.counts[stage] for stage in stage_of] for one in responses if one.counts], dtype=float)
    if not len(counts):
        return [0.0] * layers, 1.0
    whole = np.array([one.counts[0] for one in responses if one.counts], dtype=float)
    return counts.mean(0).tolist(), float((counts.mean(1) / whole).mean())


def _flops(model: Model, bench: TimedPrompt, schedule: Schedule | None) -> int:
    """FLOPs of the timed prompt's prefill, its text included: `Schedule.flops` of the counts that were really kept."""
    _, pruning = bench.generate(schedule, 1)
    n = sum(image.count for image in pruning.images)
    stages = [
        Stage(stage.layer, sum(len(kept[i]) for kept in pruning.kept), Uniform())
        for i, stage in enumerate(pruning.schedule.stages)
    ]
    size, text = models.shape(model), int(bench.inputs["input_ids"].shape[1]) - n
    return Schedule(stages).flops(
        n, layers=size.layers, attending=size.attending, reusing=size.reusing, hidden=size.hidden,
        intermediate=size.intermediate, text=text,
    )  # fmt: skip
