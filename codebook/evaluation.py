"""Scoring answers to questions with known answers, with and without pruning."""

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
) -> Scores:
    """Answer the questions under a schedule and score them; `done` hears how many are answered."""
    scores: Scores = {question.family: [] for question in questions}
    for start in range(0, len(questions), BATCH):
        group = questions[start : start + BATCH]
        answers = ask(model, processor, [q.images for q in group], [q.question for q in group], schedule)
        for question, answer in zip(group, answers, strict=True):
            scores[question.family].append(miniature.score(question.family, answer.text, question.answer))
        done(start + len(group))
    return scores


def mean(scores: Scores) -> float:
    """Mean accuracy over the families."""
    return statistics.fmean(statistics.fmean(values) for values in scores.values())


def standard_error(scores: Scores) -> float:
    """Standard error of that mean, from the spread of the questions within each family."""
    variances = [statistics.pvariance(values) / len(values) for values in scores.values()]
    return float(sum(variances) ** 0.5 / len(variances))
