"""The miniature's questions as samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from codebook import miniature
from codebook.inference.samples import Sample, Scorer


def _of_family(family: str, prediction: str, answers: Sequence[str]) -> float:
    return max(miniature.score(family, prediction, answer) for answer in answers)


SCORERS: dict[str, Scorer] = {family: partial(_of_family, family) for family in miniature.FAMILIES}
"""Of the miniature's task families."""


def of_miniature(
    split: str = "train", seed: int = 0, count: int = 50, families: Sequence[str] = miniature.FAMILIES
) -> list[Sample]:
    """`count` labelled samples of each of the miniature's task families, or of some.

    Scenes of the train split are no training images, but like them; the test split is for final measurements only.
    """
    return of_questions(q for family in families for q in miniature.tasks(family, split, seed, count))


def of_questions(questions: Iterable[miniature.Question]) -> list[Sample]:
    """The same questions as samples."""
    return [Sample(q.images, q.question, q.answer, q.family, SCORERS[q.family], patches=q.patches) for q in questions]
