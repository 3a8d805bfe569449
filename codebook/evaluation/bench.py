"""One benchmark: every method at equal budgets, what it gets right and what it costs (docs/bench.md)."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter
from typing_extensions import TypedDict

from codebook import __version__, models
from codebook.errors import CodebookError
from codebook.evaluation.comparisons import Runs, add_comparisons, gather_runs
from codebook.evaluation.latency import Clock, TimedPrompt
from codebook.evaluation.metrics import Task
from codebook.evaluation.timing import machine, quartiles
from codebook.inference.conversation import answer_sample
from codebook.inference.prompts import check_samples
from codebook.inference.records import damaged, read_record
from codebook.inference.respond import Policy, Response, Shard, batches, remembering, respond
from codebook.inference.samples import Sample, samples_digest
from codebook.models.base import Model, Processor
from codebook.pruning import Downsample, Random, Schedule, Stage, Uniform
from codebook.pruning.deep import deep_layer
from codebook.pruning.ownership import codebooks_of
from codebook.pruning.presets import needs_codebook
from codebook.pruning.text import UNPRUNED
from codebook.pruning.tokens import digest_rows
from codebook.store.codebook import Codebook
from codebook.store.journal import Journal
from codebook.store.shipped import find_codebook

RESULTS_FORMAT = 1
"""Version of the layout of results.json."""

BASELINES = ("random", "uniform", "downsample")
"""Methods that are always among the rows, beside the unpruned model: a method that does not beat them is not needed."""

NEAR = 0.01
"""Largest distance between a schedule of counts and the budget that it is measured at."""

ROUNDS = 3, 25
"""Fewest and most timing rounds."""


class Seconds(TypedDict):
    """Times of a row in the journal."""

    first_token: FiniteFloat
    decode: FiniteFloat
    vision: FiniteFloat
    selector: FiniteFloat
    prefill: FiniteFloat


class Bytes(TypedDict):
    """Memory of a row in the journal."""

    peak_memory: int
    kv_cache: int


class Look(TypedDict):
    """An answer in the journal of samples shown, and the tokens kept for it, for each image."""

    text: str
    kept: list[list[NonNegativeInt]]
    grids: list[tuple[PositiveInt, PositiveInt]]


ROUND_COUNT, ROUND = TypeAdapter(PositiveInt), TypeAdapter(dict[str, Seconds])
RATES = TypeAdapter(dict[str, list[FiniteFloat | None]])
MEMORY, LOOK = TypeAdapter(Bytes), TypeAdapter(Look)
"""Forms of the journals' records: number of rounds, a round by row, its answers per second by row and size of batch,
memory of a row, a sample that is shown."""


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
        known: dict[tuple[str, ...], str] = {}  # methods by what they prune: one that is spelt two ways is one row
        for method in dict.fromkeys((*methods, *BASELINES)):
            try:
                own = the_codebook() if needs_codebook(method) else None
                made = row(model, method, keep, own, seeds, deep_layer(model, method, True, codebook))
            except CodebookError as error:
                skipped.append(_left_out(method, keep, str(error)))
                continue
            if (other := known.setdefault(tuple(map(schedule_key, made.schedules)), method)) == method:
                found.append(made)
            else:
                skipped.append(_left_out(method, keep, f"it is the same as {other}: {made.schedules[0]}"))
    return found, skipped


def row(
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
        Called with the number of answers so far, out of `count_answers(tasks, rows, settings, shard)`, and with a note
        on the current work.
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
    rows, refused = _possible(bench, rows, films)
    plans: dict[str, Policy] = {}
    for row in rows:
        for schedule in row.schedules:
            plans[schedule_key(schedule)] = functools.partial(_constant, schedule)
    stopped: dict[str, str] = {}
    responses = respond(
        model, processor, samples, plans, out / "answers.sqlite", lambda count: done(count, "answers"),
        batch=settings.batch, max_new_tokens=settings.max_new_tokens, shard=shard, stopped=stopped,
    )  # fmt: skip
    reasons = [[stopped[key] for key in map(schedule_key, row.schedules) if key in stopped] for row in rows]
    refused += [_left_out(row.method, row.keep, own[0]) for row, own in zip(rows, reasons, strict=True) if own]
    if shard is not None:
        return {"skipped": refused}
    rows = [row for row, own in zip(rows, reasons, strict=True) if not own]
    costs = _costs(bench, rows, out, settings, lambda note: done(len(plans) * len(samples), note))
    results, runs = [], []
    for row, cost in zip(rows, costs, strict=True):
        answers = [responses[schedule_key(schedule)] for schedule in row.schedules]
        runs.append(gather_runs(tasks, row.method, row.keep, answers))
        results.append(_result(model, bench, row, tasks, runs[-1], [one for run in answers for one in run], cost))
    add_comparisons(results, tasks, runs, settings.against)
    size = models.shape(model)
    return {
        "format": RESULTS_FORMAT,
        "version": __version__,
        "model": models.identity(model),
        "tokens": size.tokens,
        "layers": size.layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": settings.seed,
        "against": settings.against,
        "batches": list(settings.batches),
        "tasks": {
            task.name: {
                "samples": len(task.samples),
                "groups": len(task.groups()),
                "metrics": list(task.metric.names),
                "detail": list(task.metric.detail),
            }
            for task in tasks
        },
        "machine": machine(model.device.type) | {"device": model.device.type},
        "timed": {"question": timed.question, "task": timed.task, "prompt": int(bench.inputs["input_ids"].shape[1])},
        "rows": results,
        "skipped": refused,
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


def schedule_key(schedule: Schedule | None) -> str:
    """Name of a schedule in journals: its text, and a short hash of the codebook, which the text does not name."""
    if schedule is None:
        return UNPRUNED
    books = [book for stage in schedule.stages for book in codebooks_of(stage.pruner)]
    return " ".join([str(schedule), *(f"{int(digest_rows(b.prototypes[None])[0]) % 2**32:08x}" for b in books)])


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
            refused.append(_left_out(row.method, row.keep, f"{error}{more if joint else ''}"))
        else:
            good.append(row)
    return good, refused


def _left_out(method: str, keep: float, reason: str) -> dict[str, Any]:
    logging.getLogger(__name__).warning("left out: %s at %g: %s", method, keep, reason)
    return {"method": method, "keep": keep, "reason": reason}


def _costs(
    bench: TimedPrompt, rows: Sequence[Row], out: Path, settings: BenchSettings, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time and memory of each row. Every round times all rows once, in an order drawn for that round."""
    names = [f"{row.name} {schedule_key(row.schedules[0])}" for row in rows]
    device = bench.model.device.type
    about = {"model": models.identity(bench.model), "machine": machine(device), "rows": names, "seed": settings.seed}
    about["prompt"] = int(digest_rows(bench.inputs["input_ids"])[0])
    about |= {"batches": list(settings.batches)} if settings.batches else {}
    batches = [bench.repeated(size) for size in settings.batches]
    # Times of other rows, or of another machine, must not enter this comparison: each has a file of its own.
    code = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    with Journal(out / f"timing-{code}.sqlite", about) as journal:
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
                    if batches and f"rates {number}" not in journal:
                        rates = {names[i]: [one.rate(rows[i].schedules[0]) for one in batches] for i in order}
                        journal.add(f"rates {number}", rates)
                    measured = {names[i]: bench.seconds(rows[i].schedules[0]) for i in order}
                    journal.add(f"round {number}", measured)
                if number + 1 >= ROUNDS[0] and time.monotonic() - start > settings.seconds:
                    break
            journal.add("seconds", number + 1)
    done = range(read_record(journal, "seconds", ROUND_COUNT))
    rounds = [read_record(journal, f"round {i}", ROUND) for i in done]
    speeds = [read_record(journal, f"rates {i}", RATES) for i in done] if batches else []
    if not all(set(names) <= measured.keys() for measured in rounds):
        raise damaged(journal)
    if any(len(own.get(name, ())) != len(batches) for own in speeds for name in names):
        raise damaged(journal)
    return [
        _cost(rounds, name, names[0]) | read_record(journal, f"memory {name}", MEMORY)
        | {"throughput": _throughput([own[name] for own in speeds], settings.batches)}
        for name in names
    ]  # fmt: skip


def _throughput(rates: Sequence[Sequence[float | None]], sizes: Sequence[int]) -> dict[str, Any]:
    """Answers per second by size of batch, from those of each round; None where a batch did not fit into memory."""
    found: dict[str, Any] = {}
    for size, own in zip(sizes, zip(*rates, strict=True), strict=bool(rates)):
        measured = [rate for rate in own if rate is not None]
        found[str(size)] = quartiles(measured) if len(measured) == len(own) else None
    return found


def _cost(rounds: Sequence[Mapping[str, Any]], name: str, reference: str) -> dict[str, Any]:
    found: dict[str, Any] = {key: quartiles([one[name][key] for one in rounds]) for key in rounds[0][name]}
    # Ratios within a round: whatever slows the machine down for a while slows both.
    found["speedup"] = quartiles([one[reference]["first_token"] / one[name]["first_token"] for one in rounds])
    return found


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
        n, layers=size.layers, attending=size.attending, hidden=size.hidden, intermediate=size.intermediate, text=text
    )


def samples_to_show(tasks: Sequence[Task], count: int) -> list[Sample]:
    """The first sample of each of `count` tasks, which are spread evenly over all tasks."""
    count = min(count, len(tasks))
    return [tasks[i * len(tasks) // count].samples[0] for i in range(count)]


def show_rows(
    model: Model,
    processor: Processor,
    samples: Sequence[Sample],
    rows: Sequence[Row],
    file: Path | None = None,
    max_new_tokens: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Answer a few questions under every row, and note which tokens each row kept.

    Parameters
    ----------
    file
        Journal of the answers: called again, the work goes on.
    done
        Called with the number of answers so far.

    Returns
    -------
    For each sample `task`, `question`, `answer`, `grids` (rows and columns of each image's whole view, or of its first
    frame) and `rows`: for each row `method`, `keep`, `text`, `score` (None without a right answer) and `kept`: for each
    image the raster positions of those tokens of that view that were kept to the end
    """
    model = models.unwrap(model)
    found, count = [], 0
    with Journal(file, {"model": models.identity(model), "max_new_tokens": max_new_tokens}) as journal:
        for sample in samples:
            pictures, views, grids, key = sample.pictures(), [], [], samples_digest([sample])
            with remembering(model):
                for row in rows:
                    schedule = row.schedules[0]
                    name = f"{key} {schedule_key(schedule)}"
                    if name not in journal:
                        answer = answer_sample(model, processor, sample, schedule or Schedule([]), max_new_tokens)
                        seen = [image.view(kept) for image, kept in zip(answer.images, answer.kept, strict=True)]
                        journal.add(
                            name, {"text": answer.text, "kept": [s[0] for s in seen], "grids": [s[1] for s in seen]}
                        )
                    record = read_record(journal, name, LOOK)
                    grids = record["grids"]
                    if not len(grids) == len(record["kept"]) == len(pictures):
                        raise damaged(journal)
                    score = None if sample.answer is None else sample.score(record["text"])
                    own = {"text": record["text"], "score": score, "kept": record["kept"]}
                    views.append({"method": row.method, "keep": row.keep, **own})
                    done(count := count + 1)
            about = {"task": sample.task, "question": sample.question, "answer": sample.answer}
            found.append({**about, "grids": grids, "rows": views})
    return found
