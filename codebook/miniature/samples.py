"""The miniature's questions as samples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count as numbers_from

import numpy as np
from PIL import Image

from codebook.inference.captions import CaptionScorer, Mentions, count_mentions
from codebook.inference.samples import Sample, Scorer
from codebook.miniature.scenes import scene
from codebook.miniature.tasks import TASK_FAMILIES, Question, make_question, score, tasks


def _best_score(family: str, prediction: str, answers: Sequence[str]) -> float:
    return max(score(family, prediction, answer) for answer in answers)


def _objects(text: str) -> list[frozenset[str]]:
    """The words of each object that a caption names."""
    return [words for phrase in text.lower().split(",") if (words := frozenset(re.findall("[a-z0-9]+", phrase)))]


def _caption_mentions(prediction: str, answers: Sequence[str]) -> Mentions:
    """What a caption names: `red circle` is in a picture with one, and so is `circle`."""
    shown = _objects(answers[0])
    named = [next((there for there in shown if words <= there), words) for words in _objects(prediction)]
    return count_mentions(named, shown)


SCORERS: dict[str, Scorer] = {family: partial(_best_score, family) for family in TASK_FAMILIES}
"""Scorer of each task family."""
SCORERS["cap"] = CaptionScorer(_caption_mentions, SCORERS["cap"])

TURN_FAMILIES = ("exist", "attr", "count", "loc", "box", "ocr", "rel")
"""Families of the questions of `turns`: those about one scene whose answers are short."""


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


def of_turns(split: str = "train", seed: int = 0, count: int = 50) -> list[Sample]:
    """`count` questions twice: alone (task `turn 1`), and after another question about their picture (task `turn 2`).

    What pruning keeps of a picture is chosen by the first question. Both questions of a picture are asked in either
    order, so that the tasks have the same questions. The embedded models were never taught conversations: the second
    question sees the picture, and not what was asked before (`Sample.fresh`).
    """
    first: list[Sample] = []
    for index in numbers_from():
        if len(first) >= count:
            break
        first += _pair(split, seed, index)
    later = [
        replace(sample, task="turn 2", earlier=(first[row ^ 1].question,), fresh=True)
        for row, sample in enumerate(first)
    ]
    return [*first[:count], *later[:count]]


def _pair(split: str, seed: int, index: int) -> Iterator[Sample]:
    """Two questions of different families about one scene; none about a scene that lacks what they ask about."""
    shown = scene(split, 2, seed, index)  # streams of tasks lead with 1
    rng = np.random.Generator(np.random.PCG64([len(TASK_FAMILIES), seed, index]))
    families = [TURN_FAMILIES[i] for i in rng.permutation(len(TURN_FAMILIES))[:2]]
    asked = [make_question(shown, family, rng) for family in families]
    picture = Image.fromarray(shown.pixels)
    if None not in asked:
        for family, parts in zip(families, asked, strict=True):
            question, answer, patches = parts  # type: ignore[misc]
            yield Sample((picture,), question, answer, "turn 1", SCORERS[family], patches=patches)
