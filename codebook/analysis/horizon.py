"""The information horizon: the layer beyond which visual tokens no longer change the answer (arXiv 2512.07580)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from codebook import models
from codebook.analysis.prefill import Cost, Prefill
from codebook.errors import CodebookError
from codebook.inference.ask import answer_prompts
from codebook.inference.prompts import answer_ids, check_samples, prepare_samples
from codebook.inference.records import Share, damaged, read_record
from codebook.inference.samples import Sample, image_numbers, samples_digest
from codebook.inference.uncertainty import ONE_SIDED_QUANTILE, UNKNOWN, deviation, error_of_mean, sums_by_image, wilson
from codebook.models.base import Model, Processor
from codebook.models.finite import check_logits
from codebook.pruning import Drop, Schedule, Stage, remember
from codebook.store.journal import Journal

EPS = 0.01
"""Largest loss that counts as none."""
LEVEL = 0.95
"""Level of the bootstrap's percentile interval."""
RESAMPLES = 2000
"""Resamples of the bootstrap."""
GENERATED_PER_BATCH = 16
"""Samples per batch of generated answers."""

FEWEST_RIGHT = 3
"""Fewest right answers of the unpruned model to a task that can show a horizon, where right answers are known."""
GUESSES = 20
"""Most answers of a task that are tried as guesses."""

SweepMetric = Literal["probability", "accuracy", "generated"]
"""What a sweep measures; see `sweep`."""


class Values(TypedDict):
    """Values of a sample's answer in the journal: unpruned, and with no visual token from each layer on."""

    full: Share
    pruned: list[Share]


CURVES = TypeAdapter(dict[str, Values])
"""A sample in the journal: its values by the metric that they are of."""


@dataclass(frozen=True)
class Sweep:
    """Value of each sample's answer with no visual token from each layer on.

    Attributes
    ----------
    tasks : list[str]
        Task of each sample.
    full : (N,) float64
        Value of the unpruned model's answers.
    pruned : (N, layers) float64
        Values with all visual tokens removed from the input of layer l on, for l from `start` to the last.
    start : int
        First layer of the sweep: 0 is before the LLM; 1 where answers were generated.
    right : (N,) float64, optional
        Scores of the unpruned model's answers, from 0 to 1.
    guesses : dict[str, float]
        For each task with known answers the mean score of a guess without the image (`guess_rates`). What is not given
        here, or has no `right`, is taken at face value.
    images : list[int], optional
        Number of the image of each sample: those about one are no independent draws. None: each has its own.
    """

    tasks: list[str]
    full: np.ndarray
    pruned: np.ndarray
    start: int = 0
    right: np.ndarray | None = None
    guesses: Mapping[str, float] = field(default_factory=dict)
    images: Sequence[int] | None = None

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.start + self.pruned.shape[1]

    @property
    def loss(self) -> np.ndarray:
        """(N, layers) float64: full minus pruned; negative where removing helps."""
        return self.full[:, None] - self.pruned

    def by_task(self) -> dict[str, np.ndarray]:
        """Row numbers of each task's samples, tasks in order of their names."""
        named = np.array(self.tasks)
        return {task: np.flatnonzero(named == task) for task in sorted(set(self.tasks))}

    def images_of(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the images of some samples."""
        return rows if self.images is None else np.asarray(self.images)[rows]


@dataclass(frozen=True)
class Horizon:
    """The horizon of one task, or of the mean over tasks.

    Attributes
    ----------
    samples : int
        Number of samples.
    full : float
        Mean of the unpruned model.
    pruned, loss, error : list[float], list[float], list[float | None]
        For each layer of the sweep the mean with no visual token from there on, the mean loss, and the loss's standard
        error: None where a task has a single image.
    layer : int
        Smallest l whose loss is at most eps there and at every later layer; L if there is none.
    interval : (int, int)
        Interval of `layer`, by the bootstrap over images.
    safe : int
        Where to prune: upper end of the interval plus a margin. L: nowhere.
    early : list[int]
        Layers before `layer` whose loss is at most eps too. They are not safe: the curve is not monotone.
    gains : list[int]
        Layers where removing helps by more than eps and by more than two standard errors.
    unknown : str, optional
        Why the samples cannot show a horizon: answers that are wrong, or guessed, lose nothing with the image. Then
        `interval` is the whole decoder, and `layer` and `safe` are L: nowhere. None where they can.
    """

    samples: int
    full: float
    pruned: list[float]
    loss: list[float]
    error: list[float | None]
    layer: int
    interval: tuple[int, int]
    safe: int
    early: list[int]
    gains: list[int]
    unknown: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields by name; `layer`, `interval` and `safe` are None where nothing is known."""
        nothing = dict.fromkeys(("layer", "interval", "safe")) if self.unknown else {}
        return asdict(self) | nothing


def first_safe(loss: np.ndarray, eps: float) -> np.ndarray:
    """Smallest layer from which on all losses are at most eps; L if there is none. loss (..., L) -> (...) int64."""
    bad = loss > eps
    last = loss.shape[-1] - bad[..., ::-1].argmax(-1)
    return np.where(bad.any(-1), last, 0)


def horizons(
    sweep: Sweep,
    eps: float = EPS,
    *,
    margin: int | None = None,
    seed: int = 0,
) -> dict[str, Horizon]:
    """The horizon of each task and, as `mean`, of the mean over tasks where there are several.

    Parameters
    ----------
    eps
        Largest loss that counts as none, in the sweep's unit (probability or accuracy).
    margin
        Layers added for safety: missing the horizon by a few can collapse a model. Default: one in sixteen, at least 1.
    seed
        Seed of the bootstrap, which resamples images within their tasks.

    Raises
    ------
    CodebookError
        If one of several tasks is called `mean`.
    """
    layers, start = sweep.layers, sweep.start
    margin = max(1, round(layers / 16)) if margin is None else margin
    rng = np.random.default_rng(seed)
    found: dict[str, Horizon] = {}

    tail = (1 - LEVEL) / 2

    def quantile(loss: np.ndarray, q: float, side: Literal["lower", "higher"]) -> int:
        return start + int(np.quantile(first_safe(loss, eps), q, method=side))

    def one(
        samples: int, full: float, pruned: np.ndarray, error: np.ndarray, boot: np.ndarray, unknown: str | None
    ) -> Horizon:
        loss = full - pruned
        curve = {
            "samples": samples, "full": full, "pruned": pruned.tolist(), "loss": loss.tolist(),
            "error": [e if np.isfinite(e) else None for e in error.tolist()],
        }  # fmt: skip
        if unknown is not None:
            anywhere, nowhere = (start, layers), layers
            return Horizon(**curve, layer=nowhere, interval=anywhere, safe=nowhere, early=[], gains=[], unknown=unknown)
        layer = start + int(first_safe(loss, eps))
        interval = quantile(boot, tail, "lower"), quantile(boot, 1 - tail, "higher")
        return Horizon(
            **curve,
            layer=layer,
            interval=interval,
            safe=min(layers, max(layer, interval[1]) + margin),
            early=(start + np.flatnonzero(loss[: layer - start] <= eps)).tolist(),
            gains=(start + np.flatnonzero(-loss > np.maximum(eps, 2 * error))).tolist(),
        )

    by_task = sweep.by_task()
    check_tasks(by_task)
    losses = [(sweep.loss[rows], sweep.images_of(rows)) for rows in by_task.values()]
    drawn, apart = resampled(losses, rng, RESAMPLES), [deviation(*own) for own in losses]
    for (task, rows), boot, own in zip(by_task.items(), drawn, apart, strict=True):
        full, pruned, why = float(sweep.full[rows].mean()), sweep.pruned[rows].mean(0), _why_unknown(sweep, task, rows)
        found[task] = one(len(rows), full, pruned, own.error, boot, why)
    if len(by_task) > 1:
        means = (np.mean([x[rows].mean(0) for rows in by_task.values()], 0) for x in (sweep.full, sweep.pruned))
        full, pruned = float(next(means)), np.asarray(next(means))
        unknown = [task for task, own in found.items() if own.unknown is not None]
        why = f"no horizon is seen in {', '.join(unknown)}" if unknown else None
        found["mean"] = one(len(sweep.tasks), full, pruned, error_of_mean(apart), np.mean(drawn, 0), why)
    return found


def resampled(tasks: Sequence[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Means (count, L) of each task's values (n, L) in resamples of their images (n,).

    An image is drawn as often for all tasks that ask about it: with the first of them, among the images new with that.
    """
    times: dict[int, np.ndarray] = {}
    found = []
    for values, images in tasks:
        sums, sizes = sums_by_image(values, images)
        numbers = np.unique(images).tolist()
        if new := [number for number in numbers if number not in times]:
            times |= zip(new, rng.multinomial(len(new), np.full(len(new), 1 / len(new)), count).T, strict=True)
        drawn = np.stack([times[number] for number in numbers], 1)
        total = (drawn @ sizes)[:, None]  # 0 where none was drawn of a task all of whose images are others' too
        found.append(np.where(total > 0, drawn @ sums / np.maximum(total, 1), values.mean(0)))
    return found


def check_tasks(tasks: Iterable[str]) -> None:
    """Refuse tasks of samples one of which has the name of the mean over them.

    Raises
    ------
    CodebookError
    """
    if "mean" in (names := set(tasks)) and len(names) > 1:
        raise CodebookError("a task is called `mean`, as the mean over the tasks is: give it another name")


def _why_unknown(sweep: Sweep, task: str, rows: np.ndarray) -> str | None:
    """Why some samples cannot show a horizon; None if they can."""
    n, images = len(rows), len(set(sweep.images_of(rows).tolist()))
    if images < 2:
        return f"one {'sample' if n == 1 else 'image'} shows no spread: ask more questions"
    if sweep.right is None or task not in sweep.guesses:
        return None
    right, guess = float(sweep.right[rows].sum()), sweep.guesses[task]
    said = f"the unpruned model answers {right:g} of {n} right"
    remedy = "ask more questions" if right == n else "ask more questions, or such as it can answer"
    if right < FEWEST_RIGHT:
        return f"{said}: {remedy}"
    if wilson(right / n, images, ONE_SIDED_QUANTILE)[0] <= guess:
        return f"{said}, and a guess {guess:.0%}: {remedy}"
    return None


def guess_rates(samples: Sequence[Sample]) -> dict[str, float]:
    """For each task with known answers the mean score of the best constant answer: what needs no look at the image.

    The answers tried are the most frequent ones of the task itself, each scored on the samples that it is not from. A
    sample without an answer counts as 0: it is measured by the model's own, which is no guess.
    """
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    rates = {}
    for task, group in by_task.items():
        known = [sample for sample in group if sample.answer is not None]
        if not known:
            continue
        sources = {str(sample.answer): sample for sample in known}
        guesses = [answer for answer, _ in Counter(str(sample.answer) for sample in known).most_common(GUESSES)]
        # Its source is no evidence that a guess is right: a task whose answers all differ cannot be guessed.
        sums = [sum(s.score(guess) for s in known if s is not sources[guess]) for guess in guesses]
        rates[task] = max(sums) / max(1, len(group) - 1)
    return rates


def sweep(
    model: Model,
    processor: Processor,
    samples: Sequence[Sample],
    metric: SweepMetric = "probability",
    file: Path | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> tuple[Sweep, Cost]:
    """Remove all visual tokens from each layer on, one layer after the other.

    Parameters
    ----------
    samples
        Samples; where one has no answer, the unpruned model's own stands for it.
    metric
        `probability`: that of the answer's first telling token, given those before it: `telling_tokens`. `accuracy`:
        whether that token is the most probable one. `generated`: the score of a generated answer, which takes one
        answer per layer.
    file
        Journal of the finished samples: called again, the sweep goes on.
    done
        Called with the number of samples done so far.

    Returns
    -------
    Sweep
    Cost
        Work of the prefills and continuations that this call ran; none for `generated`.
    """
    if not samples:
        raise CodebookError("there are no samples to sweep: give one at least")
    check_tasks(sample.task for sample in samples)
    model = models.unwrap(model)
    about = {
        "model": models.identity(model),
        "data": samples_digest(samples),
        "kind": "generated" if metric == "generated" else "telling",
    }
    check_samples(model, processor, samples)
    cost = Cost()
    with Journal(file, about) as journal:
        if metric == "generated":
            _generate(model, processor, samples, journal, done)
        else:
            telling = telling_tokens(processor, samples)
            for i, sample in enumerate(samples):
                if str(i) not in journal:
                    record, own = _one_token(model, processor, sample, telling[i])
                    journal.add(str(i), record)
                    cost += own
                done(i + 1)
    generated = metric == "generated"
    records = [read_record(journal, str(i), CURVES) for i in range(len(samples))]
    judge, length = "generated" if generated else "accuracy", models.shape(model).layers - generated
    if not all({metric, judge} <= r.keys() and len(r[metric]["pruned"]) == length for r in records):
        raise damaged(journal)
    full, right = (np.array([r[kind]["full"] for r in records]) for kind in (metric, judge))
    pruned = np.array([r[metric]["pruned"] for r in records])
    tasks = [sample.task for sample in samples]
    return Sweep(tasks, full, pruned, int(generated), right, guess_rates(samples), image_numbers(samples)), cost


def telling_tokens(processor: Processor, samples: Sequence[Sample]) -> list[list[int]]:
    """The tokens of each answer up to the first one that says something about the image, and that one last.

    Tokenizers often begin every answer, or every number, with a token for the space before it, and answers of one task
    may all begin with the same word. Such a token is known without a look at the image, and its probability would say
    that no layer reads the image at all. So what all answers of a task begin with is passed over, and blank tokens.

    Returns
    -------
    For each sample token ids, at least one; [] for a sample without an answer
    """
    ids = [[] if sample.answer is None else answer_ids(processor, sample) for sample in samples]
    by_task: dict[str, list[list[int]]] = {}
    for sample, own in zip(samples, ids, strict=True):
        if own:
            by_task.setdefault(sample.task, []).append(own)
    shared = {task: _shared(answers) for task, answers in by_task.items()}
    telling = []
    for sample, own in zip(samples, ids, strict=True):
        at = shared.get(sample.task, 0)
        while at < len(own) - 1 and is_blank(processor, own[at]):
            at += 1
        telling.append(own[: at + 1])  # one answer may be the beginning of all others: then all of it
    return telling


def _shared(answers: Sequence[Sequence[int]]) -> int:
    """With how many tokens all answers of a task begin; 0 where they are one and the same answer."""
    if len(set(map(tuple, answers))) == 1:
        return 0
    return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*answers, strict=False))))


def is_blank(processor: Processor, token: int) -> bool:
    """Whether a token is nothing but white space, as the one before a number often is."""
    return not processor.tokenizer.decode([token]).strip()


def continued(inputs: Any, ids: Sequence[int]) -> dict[str, Any]:
    """The processor's output for one sample with the first tokens of an answer behind the prompt."""
    prompt = inputs["input_ids"]
    fill = {"input_ids": prompt.new_tensor([list(ids)])}
    fill["attention_mask"] = torch.ones_like(fill["input_ids"])
    text = torch.zeros_like(fill["input_ids"])  # what token types call text
    return {
        name: torch.cat([value, fill.get(name, text).to(value.dtype)], 1)
        if isinstance(value, torch.Tensor) and value.shape == prompt.shape
        else value
        for name, value in inputs.items()
    }


def telling_prefill(
    model: Model, processor: Processor, sample: Sample, telling: Sequence[int]
) -> tuple[Prefill, int, int, Cost]:
    """The prefill whose logits are those of a sample's telling token.

    Parameters
    ----------
    telling
        As `telling_tokens` gives them; [] for the unpruned model's own answer.

    Returns
    -------
    prefill
    id of the telling token
    number of the answer's tokens that stand behind the prompt
    cost of a further prefill, if one was needed
    """
    inputs = prepare_samples(model, processor, [sample]).inputs
    prefill = Prefill.of(model, continued(inputs, telling[:-1]))
    if telling:
        return prefill, telling[-1], len(telling) - 1, Cost()
    target = int(prefill.logits.argmax())
    if not is_blank(processor, target):
        return prefill, target, 0, Cost()
    spent, prefill = prefill.cost, Prefill.of(model, continued(inputs, [target]))  # one token further
    return prefill, int(prefill.logits.argmax()), 1, spent


def _one_token(
    model: Model, processor: Processor, sample: Sample, telling: Sequence[int]
) -> tuple[dict[str, Any], Cost]:
    prefill, target, _, spent = telling_prefill(model, processor, sample, telling)
    kept = torch.zeros(prefill.layers, len(prefill.visual), dtype=torch.bool, device=prefill.visual.device)
    logits = torch.cat([prefill.logits[None], prefill.answers(range(prefill.layers), kept)])
    check_logits(logits)
    values: Mapping[str, torch.Tensor] = {
        "probability": logits.softmax(-1)[:, target], "accuracy": (logits.argmax(-1) == target).float()
    }  # fmt: skip
    record = {
        k: {"full": round(float(v[0]), 7), "pruned": [round(x, 7) for x in v[1:].tolist()]} for k, v in values.items()
    }
    return record, spent + prefill.cost


def _generate(
    model: Model, processor: Processor, samples: Sequence[Sample], journal: Journal, done: Callable[[int], None]
) -> None:
    layers = models.shape(model).layers
    for start in range(0, len(samples), GENERATED_PER_BATCH):
        group = list(samples[start : start + GENERATED_PER_BATCH])
        if str(start + len(group) - 1) not in journal:
            prompts, answers = prepare_samples(model, processor, group), {}
            with remember(model):
                for at in [layers, *range(1, layers)]:
                    schedule = Schedule([Stage(at, 0, Drop())] if at < layers else [])
                    answers[at] = [a.text for a in answer_prompts(model, processor, prompts, schedule)]
            for i, sample in enumerate(group):
                own = sample if sample.answer is not None else sample.answered(answers[layers][i])
                # A schedule keeps one token before the LLM at least: layer 1 is as early as it gets.
                scores = [own.score(answers[at][i]) for at in range(1, layers)]
                record = {"full": own.score(answers[layers][i]), "pruned": scores}
                journal.add(str(start + i), {"generated": record})
        done(start + len(group))


def horizon_table(found: Mapping[str, Horizon], layers: int) -> str:
    """The horizons as plain text, with notes on curves that are not monotone and on layers where removing helps."""

    def name(layer: int) -> str:
        return str(layer) if layer < layers else "none"

    def cells(one: Horizon) -> tuple[str, str, str]:
        if one.unknown:
            return UNKNOWN, UNKNOWN, UNKNOWN
        return name(one.layer), f"{name(one.interval[0])}-{name(one.interval[1])}", name(one.safe)

    lines = [f"{'task':<12}{'samples':>8}{'unpruned':>10}{'horizon':>9}{'interval':>10}{'safe from':>11}"]
    notes = []
    for task, one in found.items():
        layer, between, safe = cells(one)
        lines.append(f"{task:<12}{one.samples:>8}{one.full:>10.3f}{layer:>9}{between:>10}{safe:>11}")
        if one.unknown:
            notes.append(f"{task}: nothing is known: {one.unknown}")
        if one.early:
            notes.append(
                f"{task}: not monotone, the loss is small at layer {_runs(one.early)} too, but not at all later ones"
            )
        if one.gains:
            notes.append(f"{task}: removing all visual tokens helps at layer {_runs(one.gains)}")
    if unknown := [task for task, one in found.items() if one.unknown and task != "mean"]:
        last = f"no layer is known to be safe for every task: nothing is known for {', '.join(unknown)}"
    else:
        deepest = max(one.safe for one in found.values())
        last = f"safe for every task: from layer {deepest} of {layers}"
        last = last if deepest < layers else "no layer is safe for every task"
    return "\n".join([*lines, *notes, last])


def _runs(layers: Sequence[int]) -> str:
    """Layers in ascending order as text, neighbours joined: 1-4, 7."""
    starts = [a for a in layers if a - 1 not in layers]
    ends = [b for b in layers if b + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
