"""Calibrated schedules: move one budget to other layers where that pays, and only where it does.

Behind the information horizon visual tokens no longer change the answer; a random few of them, or none, free budget for
the layers before it (arXiv 2512.07580). Where the horizon is, and whether there is anything behind it, depends on model
and task. So the deep stage is searched for on a calibration set, by successive halving (Jamieson and Talwalkar, arXiv
1502.07943) over schedules of equal budget, and the winner has to beat the method alone on samples that took no part.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from codebook import models
from codebook.analysis import likelihood
from codebook.errors import CodebookError, counted
from codebook.inference.ask import answer_prompts
from codebook.inference.prompts import check_samples, prepare_samples
from codebook.inference.records import Share, read_record
from codebook.inference.respond import BATCH_SIZE, remembering
from codebook.inference.samples import Sample, image_numbers, mixed, samples_digest
from codebook.inference.uncertainty import ONE_SIDED_QUANTILE, deviation, error_of_mean
from codebook.models.base import Model, Processor
from codebook.pruning import Pruner, Schedule, remember
from codebook.pruning.ownership import codebooks_of, prototypes_digest
from codebook.store.journal import Journal

RUNGS = (0.25, 0.5, 1.0)
"""Share of the search samples that a candidate has seen after each round of the search."""
FRESH = 4
"""Fewest images of a task's confirming samples: a standard error from two or three is too uncertain for a test."""
SEARCH = 3
"""One of every SEARCH samples is used for the search; the others confirm its winner. The search compares dozens of
schedules; confirming compares two, so it needs more samples and costs less for each."""

TEXTS, VALUES = TypeAdapter(list[str]), TypeAdapter(list[Share])
"""Answers of a batch of samples in the journal, and their probabilities or scores."""

Done = Callable[[int], None]
"""Called with the number of answers scored so far."""


@dataclass(frozen=True)
class Calibration:
    """Result of a search.

    Attributes
    ----------
    schedule : Schedule
        The schedule to use: `best` if it was confirmed, else `plain`.
    plain, best : Schedule
        The method alone, and the best candidate of the search (`plain` where none was better).
    gain, error : float
        Gain of `best` over `plain` in mean probability of the answers' tokens, on the samples that took no part in the
        search, and its standard error; 0 where no candidate was better in the search.
    scores : (float, float)
        Mean scores of generated answers on the same samples, of `plain` and of `best`; nan where there was nothing to
        confirm.
    rounds : list[dict[str, float]]
        For each round the mean probabilities of the candidates that were left, by their text.
    skipped : int
        How many samples were left out because they have no answer, not even one of the model's own.
    """

    schedule: Schedule
    plain: Schedule
    best: Schedule
    gain: float
    error: float
    scores: tuple[float, float]
    rounds: list[dict[str, float]]
    skipped: int

    @property
    def unknown(self) -> str | None:
        """Why the test says little about answers: none of those generated is right, so the gain is in wrong ones."""
        if max(self.scores) > 0 or math.isnan(self.scores[0]):
            return None
        return "no generated answer is right, which says little: calibrate with questions that the model can answer"

    @property
    def confirmed(self) -> bool:
        """Whether `best` passed the test."""
        return self.schedule is not self.plain

    def evidence(self) -> dict[str, Any]:
        """The measurements behind the choice, as JSON."""
        scores = [None if math.isnan(score) else score for score in self.scores]
        return {
            "best": str(self.best), "gain": self.gain, "error": self.error,
            "scores": dict(zip(("plain", "best"), scores, strict=True)), "rounds": self.rounds, "skipped": self.skipped,
            "unknown": self.unknown,
        }  # fmt: skip

    def __str__(self) -> str:
        if self.best is self.plain:
            return f"no candidate was better than {self.plain} in the search: keep the plain method"
        found = f"{self.gain:+.4f} ± {self.error:.4f} probability, score {self.scores[0]:.3f} -> {self.scores[1]:.3f}"
        found += f"; {self.unknown}" if self.unknown else ""
        if self.confirmed:
            return f"{self.schedule} beats {self.plain} on fresh samples: {found}"
        return f"{self.best} does not beat {self.plain} beyond noise on fresh samples ({found}): keep the plain method"


def most_answers(candidates: int, samples: Sequence[Sample]) -> int:
    """Upper bound of the number of answers that `calibrate` scores, of samples in its order, for a progress bar."""
    search = search_count(samples)
    total, seen = sum(sample.answer is None for sample in samples), 0
    for i, upto in enumerate(_rungs(search)):
        total += (1 + left_after(candidates, i)) * (upto - seen)
        seen = upto
    return total + 4 * (len(samples) - search)


def calibrate(
    model: Model,
    processor: Processor,
    samples: Sequence[Sample],
    plain: Schedule,
    candidates: Sequence[Schedule],
    *,
    seed: int = 0,
    file: Path | None = None,
    done: Done = lambda count: None,
) -> Calibration:
    """Search for a candidate that beats the plain method, and confirm it on samples of its own.

    Candidates are compared by the mean probability of the answers' tokens, all tasks weighing the same: one prefill and
    one forward per sample, each image encoded once. A third of the samples serve the search. The others, about other
    images, serve one paired one-sided test (5%) of the winner, whose generated answers must also score no less than the
    plain method's.

    Parameters
    ----------
    samples
        Samples for calibration only, never those of a final measurement. Where one has no answer, the unpruned model's
        own stands for it.
    plain, candidates
        Schedules of one budget, as `candidate_schedules` makes them. Those of several methods may be searched together:
        the other methods alone are then candidates too.
    seed
        Seed of the samples' order.
    file
        Journal of the scored batches: called again, the search goes on.
    done
        Called with the number of answers scored so far, out of at most `most_answers`.

    Raises
    ------
    CodebookError
        If there are too few samples, in all or for one task, or if the model refuses one of the schedules.
    """
    model = models.unwrap(model)
    ordered = mixed(samples, seed)
    check_sample_count(ordered)
    check_samples(model, processor, samples)
    check_schedules(model, processor, samples, [plain, *candidates])
    about = models.identities(model, processor) | {
        "data": samples_digest(ordered),
        "seed": seed,
        "codebook": _codebooks([plain, *candidates]),
    }
    with Journal(file, about | {"plain": str(plain)}) as journal:
        return _halve(Search(model, processor, ordered, journal, done), plain, candidates)


def search_count(samples: Sequence[Sample]) -> int:
    """How many of the samples, in the order of `mixed`, serve the search: one of every SEARCH.

    None of the others is about an image of theirs: it would not be fresh.
    """
    count, images = len(samples) // SEARCH, image_numbers(samples)
    while 0 < count < len(images) and images[count] == images[count - 1]:
        count += 1
    return count


def check_sample_count(samples: Sequence[Sample]) -> None:
    """Refuse fewer samples than the rounds of a search and the test of its winner need.

    Parameters
    ----------
    samples
        In the order of the search, that of `mixed`.

    Raises
    ------
    CodebookError
        If there are too few samples, in all or for one task.
    """
    count, fewest = len(samples), 2 * len(RUNGS) * SEARCH
    if count < fewest:
        raise CodebookError(f"{counted(count, 'sample')} cannot calibrate: give {fewest} at least")
    fresh = samples[search_count(samples) :]
    images = {(sample.task, image) for sample, image in zip(fresh, image_numbers(fresh), strict=True)}
    counts = Counter(task for task, _ in images)
    task = min((sample.task for sample in samples), key=counts.__getitem__)
    if counts[task] < FRESH:
        enough = math.ceil(FRESH * SEARCH / (SEARCH - 1))
        raise CodebookError(
            f"task {task!r} has too few samples to confirm a gain with: give {enough} of each task, of as many images, "
            "and some more where tasks share images"
        )


def check_schedules(
    model: Model, processor: Processor, samples: Sequence[Sample], schedules: Sequence[Schedule]
) -> None:
    """Refuse, before anything is scored, schedules that cannot run: only running shows what a method asks of pictures.

    Among schedules that differ in layers and counts alone, the one that keeps the fewest tokens in the end is tried, on
    the sample of the fewest images and on that of the most: a film's methods may need several.

    Raises
    ------
    CodebookError
        If one of them cannot run.
    """
    alike: dict[tuple[Pruner, ...], list[Schedule]] = {}
    for schedule in schedules:
        alike.setdefault(tuple(stage.pruner for stage in schedule.stages), []).append(schedule)
    hardest = [min(own, key=lambda one: [stage.keep or 0 for stage in reversed(one.stages)]) for own in alike.values()]
    fewest, most = (choice(samples, key=lambda sample: len(sample.images)) for choice in (min, max))
    for sample in [fewest, most] if len(fewest.images) < len(most.images) else [fewest]:
        prompts = prepare_samples(model, processor, [sample])
        with remembering(model):
            for schedule in hardest:
                try:
                    answer_prompts(model, processor, prompts, schedule, max_new_tokens=1)
                except CodebookError as error:
                    raise CodebookError(f"{schedule} cannot be tried on this data: {error}") from None


def _halve(run: Search, plain: Schedule, candidates: Sequence[Schedule]) -> Calibration:
    """The rounds of the search, and the test of their winner."""
    skipped = run.fill_answers()
    check_sample_count(run.samples)
    search = search_count(run.samples)
    fresh = range(search, len(run.samples))
    left, rounds, seen = list(candidates), [], 0
    for i, upto in enumerate(_rungs(search)):
        run.score([plain, *left], range(seen, upto))
        means = {str(s): run.mean(s, range(upto)) for s in [plain, *left]}
        rounds.append(means)
        left = sorted(left, key=lambda s: -means[str(s)])[: left_after(len(candidates), i + 1)]
        seen = upto
    best = left[0] if left and rounds[-1][str(left[0])] > rounds[-1][str(plain)] else plain
    if best is plain:
        return Calibration(plain, plain, plain, 0.0, 0.0, (math.nan, math.nan), rounds, skipped)
    run.score([plain, best], fresh)
    gain, error = run.difference(best, plain, fresh)
    scores = run.generate(plain, fresh), run.generate(best, fresh)
    accepted = gain > ONE_SIDED_QUANTILE * error and scores[1] >= scores[0]
    return Calibration(best if accepted else plain, plain, best, gain, error, scores, rounds, skipped)


def _rungs(search: int) -> list[int]:
    return [math.ceil(share * search) for share in RUNGS]


def left_after(candidates: int, rounds: int) -> int:
    """Number of candidates after some rounds: every round keeps about the same share, and the last leaves one."""
    return math.ceil(candidates ** (1 - rounds / len(RUNGS)) - 1e-9) if candidates else 0


def _codebooks(schedules: Sequence[Schedule]) -> list[int]:
    books = {book for schedule in schedules for stage in schedule.stages for book in codebooks_of(stage.pruner)}
    return sorted({prototypes_digest(book) for book in books})


class Search:
    """The scores of schedules on samples that are known so far, and how to get more of them."""

    def __init__(self, model: Model, processor: Processor, samples: list[Sample], journal: Journal, done: Done) -> None:
        self.model, self.processor, self.samples, self.journal, self._done = model, processor, samples, journal, done
        self.values: dict[str, dict[int, float]] = {}
        self.count = 0

    @functools.cached_property  # it looks at all pictures, and every mean asks for it
    def images(self) -> list[int]:
        """`image_numbers` of the samples: first asked for behind `fill_answers`, which drops some."""
        return image_numbers(self.samples)

    def tick(self, answers: int) -> None:
        self.count += answers
        self._done(self.count)

    def fill_answers(self) -> int:
        """Let the unpruned model answer samples without an answer; drop those that still have none, return how many."""
        todo = [row for row, sample in enumerate(self.samples) if sample.answer is None]
        for start in range(0, len(todo), BATCH_SIZE):
            rows = todo[start : start + BATCH_SIZE]
            name = f"answers {rows[0]}"
            if name not in self.journal:
                answers = self._answers([self.samples[row] for row in rows], Schedule([]))
                self.journal.add(name, answers)
            texts = read_record(self.journal, name, TEXTS, len(rows))
            for row, text in zip(rows, texts, strict=True):
                self.samples[row] = self.samples[row].answered(text)
            self.tick(len(rows))
        before = len(self.samples)
        self.samples = [sample for sample in self.samples if sample.answer]
        return before - len(self.samples)

    def score(self, schedules: Sequence[Schedule], rows: range) -> None:
        """Measure the mean probability of the answers' tokens, for some samples under some schedules."""
        for group in likelihood.equal_lengths(self.processor, self.samples, rows, BATCH_SIZE):
            names = {f"{group[0]}+{len(group)} {schedule}": schedule for schedule in schedules}
            todo = {name: schedule for name, schedule in names.items() if name not in self.journal}
            if todo:
                loaded = likelihood.answer_batches(self.model, self.processor, [self.samples[row] for row in group])
                with remember(self.model):
                    for name, schedule in todo.items():
                        found = [likelihood.mean_probabilities(self.model, batch, schedule) for batch in loaded]
                        self.journal.add(name, [round(value, 7) for values in found for value in values])
            for name, schedule in names.items():
                values = read_record(self.journal, name, VALUES, len(group))
                self.values.setdefault(str(schedule), {}).update(zip(group, values, strict=True))
                self.tick(len(group))

    def generate(self, schedule: Schedule, rows: range) -> float:
        """Mean score of generated answers, all tasks weighing the same."""
        scores: dict[int, float] = {}
        for start in range(rows.start, rows.stop, BATCH_SIZE):
            group = [self.samples[row] for row in range(start, min(start + BATCH_SIZE, rows.stop))]
            name = f"generated {start} {schedule}"
            if name not in self.journal:
                answers = self._answers(group, schedule)
                self.journal.add(name, [s.score(text) for s, text in zip(group, answers, strict=True)])
            found = read_record(self.journal, name, VALUES, len(group))
            scores |= dict(enumerate(found, start))
            self.tick(len(group))
        return self._mean(scores, rows)[0]

    def _answers(self, samples: Sequence[Sample], schedule: Schedule) -> list[str]:
        prompts = prepare_samples(self.model, self.processor, samples)
        return [answer.text for answer in answer_prompts(self.model, self.processor, prompts, schedule)]

    def mean(self, schedule: Schedule, rows: range) -> float:
        return self._mean(self.values[str(schedule)], rows)[0]

    def difference(self, a: Schedule, b: Schedule, rows: range) -> tuple[float, float]:
        """Paired difference of two schedules, a minus b, and its standard error."""
        of_a, of_b = self.values[str(a)], self.values[str(b)]
        return self._mean({row: of_a[row] - of_b[row] for row in rows}, rows)

    def _mean(self, values: dict[int, float], rows: range) -> tuple[float, float]:
        """Mean over the tasks of each task's mean, and its standard error."""
        tasks: dict[str, tuple[list[float], list[int]]] = {}
        for row in rows:
            found, images = tasks.setdefault(self.samples[row].task, ([], []))
            found.append(values[row])
            images.append(self.images[row])
        mean = float(np.mean([np.mean(found) for found, _ in tasks.values()]))
        return mean, float(error_of_mean([deviation(np.array(found), images) for found, images in tasks.values()]))
