"""Samples to analyse a model with: pictures, a question, and where it is known the answer."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image as Picture

from codebook.errors import CodebookError
from codebook.store.pictures import read_image, read_video

Scorer = Callable[[str, Sequence[str]], float]
"""How right a prediction is, 0 to 1, given the right answers."""


def same_words(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction has the words of one of the answers, whatever their case."""
    return float(any(prediction.lower().split() == answer.lower().split() for answer in answers))


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes
    ----------
    images
        Its pictures, or the paths that they are read from when they are needed.
    question, answer
        In plain words; an answer of None means that the unpruned model's own one stands for it.
    task
        What results are grouped by.
    scorer
        Scores a generated answer.
    answers
        All right answers where there are several; annotators may repeat each other.
    patches
        Of each image the visual tokens that the answer needs, where that is known.
    """

    images: tuple[Picture.Image | Path, ...] = field(repr=False)
    question: str
    answer: str | None = None
    task: str = "all"
    scorer: Scorer = field(default=same_words, repr=False)
    answers: tuple[str, ...] = field(default=(), repr=False)
    patches: tuple[list[int], ...] = field(default=(), repr=False)

    def pictures(self) -> list[Picture.Image]:
        return [read_image(image) if isinstance(image, Path) else image for image in self.images]

    def score(self, prediction: str) -> float:
        """How right a generated answer is, 0 to 1."""
        assert self.answer is not None
        return self.scorer(prediction, self.answers or (self.answer,))

    def answered(self, answer: str) -> Sample:
        return replace(self, answer=answer, answers=())


def read_samples(source: Path) -> list[Sample]:
    """The samples of a JSONL file of {"image" or "images" or "video", "question", "answer" or "answers", "task"}.

    Paths are relative to the file; answers and `task` may be missing. Every line and every picture is checked first.
    Frames of a video are images of the sample, as `codebook.store.pictures.read_video` gives them.

    Raises
    ------
    CodebookError
        Naming the line that is wrong, or the picture.
    """
    try:
        lines = source.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CodebookError(f"cannot read {source}: {error}; give a JSONL file or `miniature`") from None
    samples = [_sample(source, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise CodebookError(f"{source} holds no samples: {FORMAT}")
    for path in {image for sample in samples for image in sample.images if isinstance(image, Path)}:
        if not path.is_file():
            raise CodebookError(f"{source} names an image that is missing: {path}")
    return samples


FORMAT = (
    'write lines of {"image": "file.png", "question": "...", "answer": "...", "task": "..."}, the last two optional; '
    '"images" and "answers" are lists, "video" is a folder of frames or an animated picture'
)


def _sample(source: Path, number: int, line: str) -> Sample:
    try:
        record = json.loads(line)
        shown = (
            [record["video"]] if "video" in record else record["images"] if "images" in record else [record["image"]]
        )
        answers = record["answers"] if "answers" in record else [record["answer"]] if record.get("answer") else []
        texts = [record["question"], record.get("task") or ""]
        lists = isinstance(shown, list) and shown and isinstance(answers, list)
        good = lists and all(isinstance(text, str) for text in [*shown, *answers, *texts])
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise CodebookError(f"{source}, line {number}: {FORMAT}")
    question, task = texts
    paths = tuple(source.parent / name for name in shown)
    images = read_video(paths[0]) if "video" in record else paths
    # The answer that most annotators gave stands for all where one is asked for.
    answer = max(answers, key=answers.count) if answers else None
    return Sample(images, question, answer, task or "all", answers=tuple(answers) if len(answers) > 1 else ())


def mixed(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """The same samples in an order in which every stretch has all tasks in about equal numbers."""
    tasks: dict[str, list[Sample]] = {}
    for sample in samples:
        tasks.setdefault(sample.task, []).append(sample)
    for own in tasks.values():
        random.Random(seed).shuffle(own)
    # Each sample at its share of the way through its task: small tasks spread over the whole.
    placed = [((i + 0.5) / len(own), task, sample) for task, own in tasks.items() for i, sample in enumerate(own)]
    return [sample for _, _, sample in sorted(placed, key=lambda item: item[:2])]


def digest(samples: Sequence[Sample]) -> str:
    """Tells one list of samples from another."""
    hashed = hashlib.sha256()
    for sample in samples:
        hashed.update(json.dumps([sample.question, sample.answer, sample.task]).encode())
        for image in sample.images:
            hashed.update(str(image).encode() if isinstance(image, Path) else image.tobytes())
    return hashed.hexdigest()[:16]
