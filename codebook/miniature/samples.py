"""The miniature's questions as samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from codebook.inference.samples import Sample, Scorer
from codebook.miniature.tasks import TASK_FAMILIES, Question, score, tasks


def _best_score(family: str, prediction: str, answers: Sequence[str]) -> float:
    return max(score(family, prediction, answer) for answer in answers)


SCORERS: dict[str, Scorer] = {family: partial(_best_score, family) for family in TASK_FAMILIES}
"""Scorer of each task family."""


def of_miniature(
    split: str = "train", seed: int = 0, count: int = 50, families: Sequence[str] = TASK_FAMILIES
) -> list[Sample]:
    """`count` labelled samples of each of these task families.

    Parameters
    ----------
    split
        `train`: new scenes of the kind that the model was trained on; `test`: held out, for final measurements only.
    """
    return of_questions(question for family in families for question in tasks(family, split, seed, count))


def of_questions(questions: Iterable[Question]) -> list[Sample]:
    """The same questions as samples."""
    return [Sample(q.images, q.question, q.answer, q.family, SCORERS[q.family], patches=q.patches) for q in questions]
