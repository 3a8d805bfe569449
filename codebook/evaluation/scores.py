"""Scores of the miniature's task families."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from codebook import miniature
from codebook.inference import ask
from codebook.pruning import Schedule

BATCH = 32

Scores = dict[str, list[float]]
"""For each task family the scores of its questions, 0 to 1."""


def score(
    model: Any,
    processor: Any,
    questions: Sequence[miniature.Question],
    schedule: Schedule | None = None,
    done: Callable[[int], None] = lambda count: None,
    *,
    blind: bool = False,
) -> Scores:
    """Answer the questions under a schedule and score them.

    Parameters
    ----------
    done
        Hears how many are answered.
    blind
        Leave the images out of the prompts: what the questions alone give away.
    """
    scores: Scores = {question.family: [] for question in questions}
    for start in range(0, len(questions), BATCH):
        group = questions[start : start + BATCH]
        images = [() if blind else q.images for q in group]
        answers = ask(model, processor, images, [q.question for q in group], schedule)
        for question, answer in zip(group, answers, strict=True):
            scores[question.family].append(miniature.score(question.family, answer.text, question.answer))
        done(start + len(group))
    return scores


def family_means(scores: Scores) -> dict[str, float]:
    """Mean accuracy of each family."""
    return {family: statistics.fmean(values) for family, values in scores.items()}


def mean(scores: Scores) -> float:
    """Mean accuracy over the families."""
    return statistics.fmean(family_means(scores).values())


def standard_error(scores: Scores) -> float:
    """Standard error of that mean, from the spread of the questions within each family."""
    variances = [statistics.pvariance(values) / len(values) for values in scores.values()]
    return float(sum(variances) ** 0.5 / len(variances))
