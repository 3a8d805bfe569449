"""Metrics of the answers to a task, and their confidence intervals.

Every metric is a smooth function of sums over groups of samples, where a group shows one image. So one rule gives every
confidence interval, also that of a difference between two methods: the delta method on group means. Methods are
compared on the same groups, so a group that is hard for both does not widen the interval of their difference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from codebook.inference.captions import CaptionScorer
from codebook.inference.samples import Sample, image_groups, image_numbers
from codebook.inference.uncertainty import ALIKE, Deviation, error_over_tasks, wilson


@dataclass(frozen=True)
class Metric:
    """A rule that scores the answers to a task.

    Attributes
    ----------
    names
        Names of its values, which are all from 0 to 1; tables show the first, of which more is better.
    count
        Computes the sums of one group from its samples and the predictions.
    values
        Computes the values (..., names) from sums (..., sums).
    detail
        Those of its values that get a table of their own.
    """

    names: tuple[str, ...]
    count: Callable[[Sequence[Sample], Sequence[str]], list[float]]
    values: Callable[[np.ndarray], np.ndarray]
    detail: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Samples that are reported together, as one number."""

    name: str
    samples: list[Sample]
    metric: Metric

    @functools.cached_property  # it looks at files, and is asked for by every row of a benchmark
    def groups(self) -> list[list[int]]:
        """Rows of samples by image: questions about one image are no independent draws."""
        return image_groups(self.samples)

    def sums(self, texts: Sequence[str]) -> np.ndarray:
        """(groups, sums) float64 of the predictions; the sums of several runs, such as seeds, may be averaged."""
        groups = [([self.samples[row] for row in rows], [texts[row] for row in rows]) for rows in self.groups]
        return np.array([self.metric.count(*group) for group in groups], dtype=float)


def numbers_of_groups(tasks: Sequence[Task]) -> list[np.ndarray]:
    """For each task the numbers of the images of its groups: those of an image are the same in all tasks."""
    every = [sample for task in tasks for sample in task.samples]
    numbers, start, found = image_numbers(every), 0, []
    for task in tasks:
        found.append(np.array([numbers[start + rows[0]] for rows in task.groups]))
        start += len(task.samples)
    return found


@dataclass(frozen=True)
class Estimate:
    """A value with its uncertainty: `influence` (groups,) is what each group contributes to its deviation."""

    value: float
    influence: np.ndarray

    @property
    def error(self) -> float:
        """Standard error from the spread of the groups; 0 where there is a single one, which shows none."""
        n = len(self.influence)
        return float(np.sqrt(np.sum(self.influence**2) / (n * (n - 1)))) if n > 1 else 0.0

    @property
    def interval(self) -> list[float] | None:
        """95% interval, by Wilson's formula with the number of independent samples that would have this error.

        So it stays between 0 and 1, and is not empty where all groups are alike, as where all answers are right. None
        where there is a single group.
        """
        value, n = min(max(self.value, 0.0), 1.0), float(len(self.influence))
        if n < 2:
            return None
        if self.error > ALIKE and 0 < value < 1:
            n = value * (1 - value) / self.error**2
        return list(wilson(value, n))

    def __sub__(self, other: Estimate) -> Estimate:
        """The paired difference of two estimates over the same groups."""
        return Estimate(self.value - other.value, self.influence - other.influence)


def estimate(metric: Metric, sums: np.ndarray) -> Estimate:
    """The metric's first value, from the sums (groups, sums) of its groups."""
    return estimates(metric, sums)[0]


def estimates(metric: Metric, sums: np.ndarray) -> list[Estimate]:
    """All of the metric's values, from the sums (groups, sums) of its groups."""
    mean = sums.mean(0)
    step = 1e-6 * max(1.0, float(np.abs(mean).max()))
    slopes = [(metric.values(mean + step * e) - metric.values(mean - step * e)) / (2 * step) for e in np.eye(len(mean))]
    influences = (sums - mean) @ np.array(slopes)  # (groups, names)
    return [Estimate(float(value), own) for value, own in zip(metric.values(mean), influences.T, strict=True)]


def mean_of(estimates: Sequence[Estimate], images: Sequence[np.ndarray] | None = None) -> tuple[float, float | None]:
    """Mean over the tasks, all weighing the same, and its standard error, None if unknown; see `error_over_tasks`.

    Parameters
    ----------
    images
        Those of `numbers_of_groups`. None: no image is in two of the tasks.
    """
    sizes = [len(one.influence) for one in estimates]
    numbers = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]) if images is None else images
    scales = [max(1, n * (n - 1)) ** -0.5 for n in sizes]
    deviations = [Deviation(x * one.influence, own) for one, x, own in zip(estimates, scales, numbers, strict=True)]
    return float(np.mean([one.value for one in estimates])), error_over_tasks(deviations)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=np.abs(whole) > 1e-12)


def _scores(samples: Sequence[Sample], texts: Sequence[str]) -> list[float]:
    return [sum(s.score(text) for s, text in zip(samples, texts, strict=True)), float(len(samples))]


ACCURACY = Metric(("accuracy",), _scores, lambda sums: _ratio(sums[..., :1], sums[..., 1:2]))
"""Mean of the samples' own scores."""


def _of_units(samples: Sequence[Sample], texts: Sequence[str]) -> list[float]:
    """Sum of the scores and number of the samples; then of each kind of unit those all of whose samples are right."""
    scores = [s.score(text) for s, text in zip(samples, texts, strict=True)]
    sums = [sum(scores), float(len(scores))]
    for names in zip(*(sample.units for sample in samples), strict=True):
        units: dict[str, list[float]] = {}
        for name, score in zip(names, scores, strict=True):
            units.setdefault(name, []).append(score)
        sums += [float(sum(map(all, units.values()))), float(len(units))]
    return sums


def _shares(sums: np.ndarray) -> np.ndarray:
    return _ratio(sums[..., ::2], sums[..., 1::2])


CIRCULAR = Metric(("circular", "accuracy"), _of_units, lambda sums: _shares(sums)[..., ::-1], ("accuracy",))
"""MMBench's CircularEval: the share of questions that are right with their options in every rotation, and the share of
right answers (arXiv 2307.06281)."""

HALLUSION = Metric(("accuracy", "per_figure", "per_question"), _of_units, _shares, ("per_figure", "per_question"))
"""HallusionBench's three accuracies: of all answers, of figures all of whose questions are right, and of questions that
are right with all their figures (arXiv 2310.14566)."""


def says_yes(text: str) -> bool:
    """POPE's rule: anything but a first sentence with the word no or not (arXiv 2305.10355)."""
    words = text.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def _confusion(samples: Sequence[Sample], texts: Sequence[str]) -> list[float]:
    sums = [0.0] * 4
    for sample, text in zip(samples, texts, strict=True):
        sums[2 * (sample.answer != "yes") + (not says_yes(text))] += 1
    return sums


def _pope_values(sums: np.ndarray) -> np.ndarray:
    hit, missed, false, right = np.moveaxis(sums, -1, 0)
    return np.stack(
        [
            _ratio(2 * hit, 2 * hit + missed + false),
            _ratio(hit + right, hit + missed + false + right),
            _ratio(hit, hit + false),
            _ratio(hit, hit + missed),
            _ratio(hit + false, hit + missed + false + right),
        ],
        axis=-1,
    )


POPE_NAMES = ("f1", "accuracy", "precision", "recall", "yes_share")
POPE = Metric(POPE_NAMES, _confusion, _pope_values, POPE_NAMES[1:])
"""F1 of the answer "yes", and how often that is the answer (arXiv 2305.10355)."""


def _mentions(samples: Sequence[Sample], texts: Sequence[str]) -> list[float]:
    sums = np.zeros(7)
    for sample, text in zip(samples, texts, strict=True):
        assert isinstance(sample.scorer, CaptionScorer)
        own = sample.scorer.count(text, sample.answers or (sample.answer or "",))
        sums += [sample.score(text), 1, own.false > 0, own.false, own.said, own.found, own.shown]
    return sums.tolist()


def _chair_values(sums: np.ndarray) -> np.ndarray:
    score, captions, wrong, false, said, found, shown = np.moveaxis(sums, -1, 0)
    parts = (score, captions), (wrong, captions), (false, said), (found, shown)
    return np.stack([_ratio(*part) for part in parts], axis=-1)


CHAIR = Metric(("accuracy", "chair_s", "chair_i", "recall"), _mentions, _chair_values, ("chair_s", "chair_i", "recall"))
"""Mean of the captions' own scores; CHAIR_S, the share of captions that name an object which is not in the picture;
CHAIR_I, the share of such mentions among all (arXiv 1809.02156: less is better); and the share of the pictures' objects
that are named, without which an empty caption would look best."""


def yes_or_no(prediction: str, answers: Sequence[str]) -> float:
    """MME's rule: yes or no among the first four letters, whatever their case (arXiv 2306.13394)."""
    start = prediction.strip().lower()[:4]
    answer = "yes" if "yes" in start else "no" if "no" in start else None
    return float(answer == answers[0])


def _pairs(samples: Sequence[Sample], texts: Sequence[str]) -> list[float]:
    scores = [s.score(text) for s, text in zip(samples, texts, strict=True)]
    pairs: dict[Hashable, list[float]] = {}  # by name: two names of one picture are one group, and two pairs
    for sample, score in zip(samples, scores, strict=True):
        pairs.setdefault(sample.images, []).append(score)
    return [sum(scores), float(len(scores)), float(sum(map(all, pairs.values()))), float(len(pairs))]


def _mme_values(sums: np.ndarray) -> np.ndarray:
    single, both = _ratio(sums[..., 0], sums[..., 1]), _ratio(sums[..., 2], sums[..., 3])
    return np.stack([(single + both) / 2, single, both], axis=-1)


MME = Metric(("score", "accuracy", "accuracy_plus"), _pairs, _mme_values)
"""Accuracy over a category's questions, and accuracy+, the share of its images with both questions right. The official
score is their sum in percent, 200 at most; `score` is half of it, from 0 to 1 (arXiv 2306.13394)."""
