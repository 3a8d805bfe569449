"""Answers with no visual token from each layer on: what the information horizon is read from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from codebook import models
from codebook.analysis.prefill import Cost
from codebook.analysis.telling import telling_prefill, telling_tokens
from codebook.errors import CodebookError
from codebook.inference.ask import answer_prompts
from codebook.inference.prompts import check_samples, prepare_samples
from codebook.inference.records import Share, damaged, read_record
from codebook.inference.samples import Sample, image_numbers, samples_digest
from codebook.models.base import Model, Processor
from codebook.models.finite import check_logits
from codebook.pruning import Drop, Schedule, Stage, remember
from codebook.store.journal import Journal

GENERATED_PER_BATCH = 16
"""Samples per batch of generated answers."""

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
        Values with all visual tokens removed from the input of layer l on, for l from `start` to the last that
        stages can be at.
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
        """Number of layers that stages can be at: of the decoder's, all but in models whose last ones have no keys."""
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


def check_tasks(tasks: Iterable[str]) -> None:
    """Refuse tasks of samples one of which has the name of the mean over them.

    Raises
    ------
    CodebookError
    """
    if "mean" in (names := set(tasks)) and len(names) > 1:
        raise CodebookError("a task is called `mean`, as the mean over the tasks is: give it another name")


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
    about = models.identities(model, processor) | {
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
    judge, length = "generated" if generated else "accuracy", models.shape(model).stages - generated
    if not all({metric, judge} <= r.keys() and len(r[metric]["pruned"]) == length for r in records):
        raise damaged(journal)
    full, right = (np.array([r[kind]["full"] for r in records]) for kind in (metric, judge))
    pruned = np.array([r[metric]["pruned"] for r in records])
    tasks = [sample.task for sample in samples]
    return Sweep(tasks, full, pruned, int(generated), right, guess_rates(samples), image_numbers(samples)), cost


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
    layers = models.shape(model).stages
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
