"""One benchmark: every method at equal budgets, what it gets right and what it costs (docs/bench.md)."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import codebook
from codebook import models
from codebook.errors import CodebookError
from codebook.evaluation.latency import Bench
from codebook.evaluation.metrics import Estimate, Task, Z, estimate, mean_of
from codebook.evaluation.timing import machine, quartiles
from codebook.inference.ask import ask
from codebook.inference.journal import Journal
from codebook.inference.prompts import prepare
from codebook.inference.respond import Policy, Said, Shard, batches, remembering, respond
from codebook.inference.samples import Sample, digest
from codebook.pruning import Downsample, Random, Schedule, Stage, Uniform
from codebook.pruning.text import Make
from codebook.pruning.tokens import digest_rows

FORMAT = 1
"""Of results.json."""

BASELINES = ("random", "uniform", "downsample")
"""Always among the rows, with the unpruned model: what a method must beat to be worth its while."""

UNPRUNED = "unpruned"
NEAR = 0.01
"""How far from a budget a schedule of counts may be that is measured at it."""

ROUNDS = 3, 25
"""Of timing, at least and at most."""


@dataclass(frozen=True)
class Row:
    """A method at a budget.

    Attributes
    ----------
    method
        As the user names it.
    keep
        The budget: visual tokens averaged over the decoder's layers, as a fraction.
    schedules
        One, or one a seed for methods that draw at random; None for the unpruned model.
    """

    method: str
    keep: float
    schedules: tuple[Schedule | None, ...]

    @property
    def name(self) -> str:
        return self.method if self.schedules == (None,) else f"{self.method} {self.keep:g}"


@dataclass(frozen=True)
class Settings:
    """How `run` measures.

    Attributes
    ----------
    seed
        Of the data, of random methods and of the order of timings.
    batch, max_new_tokens
        Of answers: samples at once, the longest answer.
    seconds
        Spent on timing, after 3 rounds at least.
    against
        A method of the rows that all rows of its budget are compared with, as they are with the unpruned model.
    """

    seed: int = 0
    batch: int = 32
    max_new_tokens: int = 32
    seconds: float = 120.0
    against: str | None = None


def plan(
    model: Any, methods: Sequence[str], keeps: Sequence[float], make: Make, seeds: Sequence[int] = (0,)
) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of a benchmark, `unpruned` first, then budget by budget; and those that cannot be, with the reason.

    Parameters
    ----------
    methods
        As `Schedule.solve` takes them; BASELINES are added.
    make
        Makes the pruner of a method's name.
    seeds
        Of methods that draw at random.
    """
    found, skipped = [Row(UNPRUNED, 1.0, (None,))], []
    for keep in keeps:
        for method in dict.fromkeys((*methods, *BASELINES)):
            try:
                found.append(row(model, method, keep, make, seeds))
            except CodebookError as error:
                skipped.append({"method": method, "keep": keep, "reason": str(error)})
    return found, skipped


def row(model: Any, method: str, keep: float, make: Make, seeds: Sequence[int]) -> Row:
    """One method at a budget, as `plan` takes them.

    Raises
    ------
    CodebookError
        If the budget cannot be met.
    """
    rows, cols = models.family(model).grid(model)
    schedule = _fitted(method, make, rows * cols, models.shape(model).layers, keep)
    schedule = _shrunk(schedule, rows, cols).shares(rows * cols)
    return Row(method, keep, tuple(reseeded(schedule, seeds)))


def _fitted(method: str, make: Make, n: int, layers: int, keep: float) -> Schedule:
    schedule, _ = Schedule.draft(method, make, layers)
    counts = [stage.keep for stage in schedule.stages if isinstance(stage.keep, int)]
    if len(counts) < len(schedule.stages) or counts == [0]:  # a single drop moves its layer
        return schedule.fit(keep, n=n, layers=layers)
    if abs((own := schedule.budget(n, layers)) - keep) > NEAR:
        raise CodebookError(f"'{schedule}' says its counts, and they are a budget of {own:.3f}: give that to --keep")
    return schedule


def reseeded(schedule: Schedule, seeds: Sequence[int]) -> Iterator[Schedule]:
    """A schedule with each of several seeds for the stages that draw at random; itself, once, if there are none."""
    if not any(isinstance(stage.pruner, Random) for stage in schedule.stages):
        yield schedule
        return
    for seed in seeds:
        stages = [replace(s, pruner=Random(seed)) if isinstance(s.pruner, Random) else s for s in schedule.stages]
        yield replace(schedule, stages=stages)


def _shrunk(schedule: Schedule, rows: int, cols: int) -> Schedule:
    """A downsampled image has r x c patches: where no such number is the budget's, the next below."""
    stages = list(schedule.stages)
    if stages and isinstance(stages[0].pruner, Downsample):
        wanted = stages[0].count(rows * cols)
        whole = {r * c for r in range(1, rows + 1) for c in range(1, cols + 1)}
        stages[0] = replace(stages[0], keep=max(count for count in whole if count <= wanted))
    return replace(schedule, stages=stages)


def run(
    model: Any,
    processor: Any,
    tasks: Sequence[Task],
    rows: Sequence[Row],
    out: Path,
    settings: Settings | None = None,
    done: Callable[[int, str], None] = lambda count, note: None,
    part: Shard | None = None,
) -> dict[str, Any]:
    """Measure all rows: answers first, then, apart from them, time and memory of one prompt.

    Parameters
    ----------
    out
        Folder of the journals. Called again, what is in them is not repeated, and rows and samples that were added are
        measured.
    done
        Hears how many answers there are, of `work(tasks, rows, settings, part)`, and what is being done.
    part
        Only give this part of the answers, into a journal of its own. The parts (1, n) to (n, n) may run at once, on
        several devices, the same one in one process only; a run without `part` then finds their answers in the folder.

    Returns
    -------
    The contents of results.json, but for the samples shown; see docs/bench.md. Of a part nothing, {}
    """
    settings = settings or Settings()
    samples = [sample for task in tasks for sample in task.samples]
    timed = _prompt(samples)
    bench = Bench(model, prepare(model, processor, [timed.pictures()], [timed.question]).inputs)
    rows, refused = _possible(bench, rows)
    plans: dict[str, Policy] = {}
    for row in rows:
        for schedule in row.schedules:
            plans[_key(schedule)] = functools.partial(_always, schedule)
    said = respond(
        model, processor, samples, plans, out / "answers.jsonl", lambda count: done(count, "answers"),
        batch=settings.batch, max_new_tokens=settings.max_new_tokens, part=part,
    )  # fmt: skip
    if part is not None:
        return {}
    costs = _costs(bench, rows, out, settings, lambda note: done(len(plans) * len(samples), note))
    sums = {key: _sums(tasks, found) for key, found in said.items()}
    results = []
    for row, cost in zip(rows, costs, strict=True):
        keys = [_key(schedule) for schedule in row.schedules]
        averaged = [np.mean(own, axis=0) for own in zip(*(sums[key] for key in keys), strict=True)]
        results.append(_result(model, bench, row, tasks, averaged, [one for key in keys for one in said[key]], cost))
    _relate(results, tasks, rows, sums, settings.against)
    size = models.shape(model)
    return {
        "format": FORMAT,
        "version": codebook.__version__,
        "model": models.identity(model),
        "tokens": size.tokens,
        "layers": size.layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": settings.seed,
        "against": settings.against,
        "tasks": {
            task.name: {"samples": len(task.samples), "groups": len(task.groups()), "metrics": list(task.metric.names)}
            for task in tasks
        },
        "machine": machine(model.device.type) | {"device": model.device.type},
        "timed": {"question": timed.question, "task": timed.task, "prompt": int(bench.inputs["input_ids"].shape[1])},
        "rows": results,
        "skipped": refused,
    }


def work(
    tasks: Sequence[Task], rows: Sequence[Row], settings: Settings | None = None, part: Shard | None = None
) -> int:
    """Answers of `run`."""
    plans = {_key(schedule) for row in rows for schedule in row.schedules}
    samples, settings = [sample for task in tasks for sample in task.samples], settings or Settings()
    return len(plans) * sum(len(own) for own in batches(samples, settings.batch, part))


def _always(schedule: Schedule | None, asked: object) -> Schedule | None:
    return schedule


def _key(schedule: Schedule | None) -> str:
    """A schedule's text, and what its text does not say: which codebook."""
    if schedule is None:
        return UNPRUNED
    books = [stage.pruner.codebook for stage in schedule.stages if hasattr(stage.pruner, "codebook")]
    return " ".join([str(schedule), *(f"{int(digest_rows(b.prototypes[None])[0]) % 2**32:08x}" for b in books)])


def _prompt(samples: Sequence[Sample]) -> Sample:
    """What is timed: the first sample with as few images as any."""
    return min(samples, key=lambda sample: len(sample.images))


def _possible(bench: Bench, rows: Sequence[Row]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Try each row before the long work, and set apart what the model refuses; it warms up, too."""
    good, refused = [], []
    for row in rows:
        try:
            bench.generate(row.schedules[0], 1)
        except CodebookError as error:
            refused.append({"method": row.method, "keep": row.keep, "reason": str(error)})
        else:
            good.append(row)
    return good, refused


def _costs(
    bench: Bench, rows: Sequence[Row], out: Path, settings: Settings, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time and memory of each row, every row once a round, in an order of its own: see `timing.interleaved`."""
    names = [f"{row.name} {_key(row.schedules[0])}" for row in rows]
    device = bench.model.device.type
    about = {"model": models.identity(bench.model), "machine": machine(device), "rows": names, "seed": settings.seed}
    about["prompt"] = int(digest_rows(bench.inputs["input_ids"])[0])
    # Times of other rows, or of another machine, are no part of this comparison: each has a file of its own.
    code = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    journal = Journal(out / f"timing-{code}.jsonl", about)
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        if f"memory {name}" not in journal:
            note(f"memory {i + 1}/{len(rows)}")
            journal.add(f"memory {name}", bench.memory(row.schedules[0]))
    if "seconds" not in journal:
        start = time.monotonic()
        for number in range(ROUNDS[1]):
            if f"round {number}" not in journal:
                order = list(range(len(rows)))
                random.Random(f"{settings.seed} {number}").shuffle(order)
                note(f"timing, round {number + 1}")
                measured = {names[i]: bench.seconds(rows[i].schedules[0]) for i in order}
                journal.add(f"round {number}", measured)
            if number + 1 >= ROUNDS[0] and time.monotonic() - start > settings.seconds:
                break
        journal.add("seconds", number + 1)
    rounds = [journal[f"round {number}"] for number in range(journal["seconds"])]
    return [_cost(rounds, name, names[0]) | journal[f"memory {name}"] for name in names]


def _cost(rounds: Sequence[Mapping[str, Mapping[str, float]]], name: str, reference: str) -> dict[str, Any]:
    found: dict[str, Any] = {key: quartiles([one[name][key] for one in rounds]) for key in rounds[0][name]}
    # Round by round: what slows the machine down for a while slows both.
    found["speedup"] = quartiles([one[reference]["first_token"] / one[name]["first_token"] for one in rounds])
    return found


def _sums(tasks: Sequence[Task], said: Sequence[Said]) -> list[np.ndarray]:
    """Of each task what `Task.sums` says of one run."""
    found, start = [], 0
    for task in tasks:
        stop = start + len(task.samples)
        found.append(task.sums([one.text for one in said[start:stop]]))
        start = stop
    return found


def _result(
    model: Any,
    bench: Bench,
    row: Row,
    tasks: Sequence[Task],
    sums: Sequence[np.ndarray],
    said: Sequence[Said],
    cost: dict[str, Any],
) -> dict[str, Any]:
    schedule = row.schedules[0]
    per_layer, keep = _kept(model, schedule, said)
    scores = {}
    for task, counted in zip(tasks, sums, strict=True):
        own, values = estimate(task.metric, counted), task.metric.values(counted.mean(0))
        scores[task.name] = {
            "score": own.value, "interval": own.interval,
            "metrics": dict(zip(task.metric.names, map(float, values), strict=True)),
        }  # fmt: skip
    return {
        "method": row.method, "keep": row.keep, "schedule": str(schedule or Schedule([])), "seeds": len(row.schedules),
        "kept": {"average": keep, "layers": per_layer}, "tasks": scores,
        "cost": cost | {"flops": _flops(model, bench, schedule)},
    }  # fmt: skip


def _kept(model: Any, schedule: Schedule | None, said: Sequence[Said]) -> tuple[list[float], float]:
    """Visual tokens that each layer saw, a mean over the questions; and their mean share of the unpruned ones."""
    layers = models.shape(model).layers
    starts = [0, *(stage.layer for stage in (schedule.stages if schedule else ()))]
    stage_of = [max(i for i, start in enumerate(starts) if start <= layer) for layer in range(layers)]
    counts = np.array([[one.counts[stage] for stage in stage_of] for one in said if one.counts], dtype=float)
    if not len(counts):
        return [0.0] * layers, 1.0
    whole = np.array([one.counts[0] for one in said if one.counts], dtype=float)
    return counts.mean(0).tolist(), float((counts.mean(1) / whole).mean())


def _flops(model: Any, bench: Bench, schedule: Schedule | None) -> int:
    """Of the timed prompt's prefill, its text included, by `Schedule.flops` with the counts that were really kept."""
    _, pruning = bench.generate(schedule, 1)
    n = sum(image.count for image in pruning.images)
    stages = [
        Stage(stage.layer, sum(len(kept[i]) for kept in pruning.kept), Uniform())
        for i, stage in enumerate(pruning.schedule.stages)
    ]
    size, text = models.shape(model), int(bench.inputs["input_ids"].shape[1]) - n
    return Schedule(stages).flops(n, layers=size.layers, hidden=size.hidden, intermediate=size.intermediate, text=text)


def _relate(
    results: list[dict[str, Any]],
    tasks: Sequence[Task],
    rows: Sequence[Row],
    sums: Mapping[str, Sequence[np.ndarray]],
    against: str | None,
) -> None:
    """Add each row's mean over tasks, and its differences from other rows' on the same questions."""

    def estimates(schedules: Sequence[Schedule | None]) -> list[Estimate]:
        runs = zip(*(sums[_key(schedule)] for schedule in schedules), strict=True)
        return [estimate(task.metric, np.mean(own, axis=0)) for task, own in zip(tasks, runs, strict=True)]

    def around(value: float, error: float) -> dict[str, Any]:
        return {"change": value, "change_interval": [value - Z * error, value + Z * error]}

    found = [estimates(row.schedules) for row in rows]
    rivals = {row.keep: own for row, own in zip(rows, found, strict=True) if row.method == against}
    full = mean_of(found[0])[0]
    for result, row, own in zip(results, rows, found, strict=True):
        value, error = mean_of(own)
        interval = [max(0.0, value - Z * error), min(1.0, value + Z * error)]
        result["mean"] = {"score": value, "interval": interval, "relative": value / full if full else None}
        result["mean"] |= around(*mean_of([a - b for a, b in zip(own, found[0], strict=True)]))
        if len(row.schedules) > 1:
            means = [mean_of(estimates([schedule]))[0] for schedule in row.schedules]
            result["mean"]["spread"] = statistics.stdev(means)
        if row.keep in rivals and row.method != against:
            apart = [a - b for a, b in zip(own, rivals[row.keep], strict=True)]
            by_task = {task.name: around(one.value, one.error) for task, one in zip(tasks, apart, strict=True)}
            result["against"] = around(*mean_of(apart)) | {"tasks": by_task}


def shown(tasks: Sequence[Task], count: int) -> list[Sample]:
    """The first sample of each task, of `count` tasks spread evenly over them all."""
    count = min(count, len(tasks))
    return [tasks[i * len(tasks) // count].samples[0] for i in range(count)]


def look(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    rows: Sequence[Row],
    file: Path | None = None,
    max_new_tokens: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Answer a few questions under every row, and see what each kept.

    Parameters
    ----------
    file
        Where every answer is kept; called again, the work goes on.
    done
        Hears how many answers there are.

    Returns
    -------
    For each sample `task`, `question`, `answer`, `grids` (rows and columns of each image's whole view, or first frame)
    and `rows`: for each row `method`, `keep`, `text`, `score` (None without a right answer) and `kept`, for each image
    the raster positions of the tokens in that view which stayed to the end
    """
    journal = Journal(file, {"model": models.identity(model), "max_new_tokens": max_new_tokens})
    found, count = [], 0
    for sample in samples:
        pictures, views, grids = sample.pictures(), [], []
        with remembering(model):
            for row in rows:
                schedule = row.schedules[0]
                name = f"{digest([sample])} {_key(schedule)}"
                if name not in journal:
                    [said] = ask(model, processor, [pictures], [sample.question], schedule, max_new_tokens)
                    seen = [image.view(kept) for image, kept in zip(said.images, said.kept, strict=True)]
                    journal.add(name, {"text": said.text, "kept": [s[0] for s in seen], "grids": [s[1] for s in seen]})
                record = journal[name]
                grids = record["grids"]
                score = None if sample.answer is None else sample.score(record["text"])
                own = {"text": record["text"], "score": score, "kept": record["kept"]}
                views.append({"method": row.method, "keep": row.keep, **own})
                done(count := count + 1)
        about = {"task": sample.task, "question": sample.question, "answer": sample.answer}
        found.append({**about, "grids": grids, "rows": views})
    return found
