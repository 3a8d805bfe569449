"""Samples: pictures, a question and, where it is known, the answer."""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Required

from PIL import Image as Picture
from pydantic import ConfigDict
from typing_extensions import TypedDict

from codebook.errors import CodebookError, quoted
from codebook.store.clips import FrameRule, within
from codebook.store.pictures import USE_WHOLE, even_frames, is_picture_file, read_image, read_video
from codebook.store.reading import is_file, read_lines, sha256

Scorer = Callable[[str, Sequence[str]], float]
"""Scores a prediction from 0 (wrong) to 1 (right), given all right answers."""


def same_words(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction has the words of one of the answers, whatever their case."""
    return float(any(prediction.lower().split() == answer.lower().split() for answer in answers))


@dataclass(frozen=True)
class ClipPart:
    """The frames of a clip that are shown: those that a rule chooses of seconds `start` to `end` (None: to its end)."""

    rule: FrameRule
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True)
class Sample:
    """One question about images.

    Attributes
    ----------
    images
        The pictures, the bytes of their files, or the paths that they are read from when they are needed.
    question, answer
        In plain words; an answer of None stands for the unpruned model's own.
    task
        Name that results are grouped by.
    scorer
        Scores a generated answer.
    answers
        All right answers where there are several; annotators may repeat each other.
    patches
        For each image the visual tokens that the answer needs, where they are known.
    earlier
        Questions about the same images that are asked before this one, in the same conversation: what pruning keeps
        is chosen at the first of them. Their answers are the model's own.
    fresh
        Whether the question sees nothing of the earlier ones but what they left of the images, as where a server keeps
        the KV cache of an image for further questions.
    units
        Names of what counts as right only if all its questions are, such as a figure, or a question with its options in
        every order. The same place names the same kind in all samples of a task.
    clip
        The one image is the path of a clip, and these are its frames, which are decoded when they are needed.
    """

    images: tuple[Picture.Image | Path | bytes, ...] = field(repr=False)
    question: str
    answer: str | None = None
    task: str = "all"
    scorer: Scorer = field(default=same_words, repr=False)
    answers: tuple[str, ...] = field(default=(), repr=False)
    patches: tuple[list[int], ...] = field(default=(), repr=False)
    earlier: tuple[str, ...] = ()
    fresh: bool = False
    clip: ClipPart | None = field(default=None, repr=False)
    units: tuple[str, ...] = field(default=(), repr=False)

    def pictures(self) -> list[Picture.Image]:
        """The images as RGB and upright, read from disk where they are paths; of a clip its frames."""
        images = self.images
        if self.clip is not None:
            [path] = images
            assert isinstance(path, Path)
            images = read_video(path, within(self.clip.rule, self.clip.start, self.clip.end))
        return [self.read(image) for image in images]

    def read(self, image: Picture.Image | Path | bytes) -> Picture.Image:
        """One of the images as `read_image` gives it."""
        return read_image(image, None if isinstance(image, Path) else f"of the question {quoted(self.question)}")

    def score(self, prediction: str) -> float:
        """Score of a generated answer, from 0 (wrong) to 1 (right).

        Letters with marks may be one character or two, which look alike and mean the same: texts are compared composed.
        """
        assert self.answer is not None
        answers = [unicodedata.normalize("NFC", answer) for answer in self.answers or (self.answer,)]
        return self.scorer(unicodedata.normalize("NFC", prediction), answers)

    def answered(self, answer: str) -> Sample:
        """The same sample with this one right answer."""
        return replace(self, answer=answer, answers=())


def check_asked(question: str) -> None:
    """Refuse a question without words, which a model answers all the same.

    Raises
    ------
    CodebookError
    """
    if not question.strip():
        raise CodebookError("the question is empty: write one, such as `describe the picture.`")


def task_name(given: str | None, otherwise: str, where: str) -> str:
    """The name of a task as it was given, without white space around it.

    Raises
    ------
    CodebookError
        If it would break the tables that it stands in.
    """
    name = (given or "").strip() or otherwise
    if not name.isprintable():
        raise CodebookError(f"{where}: the task {quoted(name)} has characters that cannot be shown: rename it")
    return name


def check_one_kind(record: Mapping[str, object], source: Path, number: int) -> None:
    """Refuse a line of a file of questions that shows pictures in more than one way: but one would be shown.

    Raises
    ------
    CodebookError
    """
    if len(record.keys() & {"image", "images", "video"}) > 1:
        raise CodebookError(f"{source}, line {number}: of image, images and video there is more than one; leave one")


def read_samples(source: Path, rule: FrameRule = even_frames) -> list[Sample]:
    """The samples of a JSONL file of {"image" or "images" or "video", "question", "answer" or "answers", "task"}.

    Paths are relative to the file; answers and `task` may be missing. Every line is checked, and every picture is
    looked for, before anything else is done. The frames of a video become the images of its sample
    (`codebook.store.pictures.read_video`); of an mp4 or webm file those that `rule` chooses.

    Raises
    ------
    CodebookError
        If a line is wrong or a picture is missing; the message names it.
    """
    frames = cache(lambda path: read_video(path, rule))  # a film's frames are the same pictures for all its questions
    samples = [_parse_record(source, frames, *line) for line in read_lines(source, SAMPLE_FORMAT, SampleRecord)]
    if not samples:
        raise CodebookError(f"{source} holds no samples: {SAMPLE_FORMAT}")
    check_images(samples, str(source))
    return samples


def check_images(samples: Sequence[Sample], source: str, folder: Path | None = None) -> None:
    """Refuse images whose files are missing or begin like no picture, before work begins; of clips, missing ones.

    Parameters
    ----------
    source
        What names the images, for the error.
    folder
        Where they must lie, for data sets of others: what stands in their files does not choose what else is read.

    Raises
    ------
    CodebookError
        Naming the first.
    """
    clips = {path: s.clip is not None for s in samples for path in s.images if isinstance(path, Path)}
    for path, is_of_clip in clips.items():
        if folder is not None and (not path.is_relative_to(folder) or ".." in path.relative_to(folder).parts):
            raise CodebookError(f"an image of {source} lies outside of {folder}: {path}; download its files again")
        if not is_file(path):
            raise CodebookError(f"an image of {source} is missing: {path}")
        if not is_of_clip and not is_picture_file(path):
            raise CodebookError(f"an image of {source} is no picture: {path}; {USE_WHOLE}")


SAMPLE_FORMAT = (
    'write lines of {"image": "file.png", "question": "...", "answer": "...", "task": "..."}, the last two optional; '
    '"images", "answers" and "earlier" are lists, "video" is an mp4 or webm file, a folder of frames or an animated '
    "picture"
)


class SampleRecord(TypedDict, total=False):
    """A line of a file of samples."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]
    image: str
    images: list[str]
    video: str
    question: Required[str]
    answer: str | None
    answers: list[str]
    earlier: list[str]
    task: str | None


def _parse_record(
    source: Path, frames: Callable[[Path], tuple[Path | Picture.Image, ...]], number: int, record: SampleRecord
) -> Sample:
    check_one_kind(record, source, number)
    shown = record["images"] if "images" in record else [record["image"]] if "image" in record else []
    if "video" in record:
        images = frames(source.parent / record["video"])
    elif shown:
        images = tuple(source.parent / name for name in shown)
    else:
        raise CodebookError(f"{source}, line {number}: {SAMPLE_FORMAT}")
    answer = record.get("answer")
    if answer and record.get("answers") and answer not in record["answers"]:
        raise CodebookError(f"{source}, line {number}: its answer is none of its answers: leave one of the two out")
    answers = [text for text in record.get("answers") or [answer or ""] if text.strip()]  # nothing said is never right
    # The answer that most annotators gave stands for all where one is asked for.
    most = max(answers, key=answers.count) if answers else None
    task = task_name(record.get("task"), "all", f"{source}, line {number}")
    every, earlier = tuple(answers) if len(answers) > 1 else (), tuple(record.get("earlier", ()))
    return Sample(images, record["question"], most, task, answers=every, earlier=earlier)


def image_groups(samples: Sequence[Sample]) -> list[list[int]]:
    """Rows of samples that are no independent draws: about one image, also as one of several, or of one unit.

    Files are one image where they have the same bytes, open pictures where they have the same pixels.
    """
    parent, first = list(range(len(samples))), dict[Hashable, int]()
    known = _same_files({image for sample in samples for image in sample.images if isinstance(image, Path)})
    # Questions about one open picture often share the object: its pixels are looked at once.
    opened = {id(image): image for one in samples for image in one.images if isinstance(image, Picture.Image)}
    pixels = {number: _picture_digest(image) for number, image in opened.items()}

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for row, sample in enumerate(samples):
        keys: list[Hashable] = [
            pixels[id(image)] if isinstance(image, Picture.Image) else known.get(image, image)
            for image in sample.images
        ]
        for key in [*keys, *((sample.task, place, unit) for place, unit in enumerate(sample.units))]:
            one, other = sorted((root(first.setdefault(key, row)), root(row)))
            parent[other] = one
    found: dict[int, list[int]] = {}
    for row in range(len(samples)):
        found.setdefault(root(row), []).append(row)
    return list(found.values())


def _same_files(paths: Collection[Path]) -> dict[Hashable, Hashable]:
    """For each file that may be a copy of another one, being of its size, what is the same for all its copies."""
    sizes: dict[int, list[Path]] = {}
    for path in paths:
        if is_file(path):
            sizes.setdefault(path.stat().st_size, []).append(path)
    return {path: sha256(path) for alike in sizes.values() if len(alike) > 1 for path in alike}


def image_numbers(samples: Sequence[Sample]) -> list[int]:
    """For each sample the number of its group in `image_groups`."""
    numbers = {row: number for number, rows in enumerate(image_groups(samples)) for row in rows}
    return [numbers[row] for row in range(len(samples))]


def mixed(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """The same samples, shuffled and interleaved: any stretch of them has each task in about its share of the whole.

    Questions about one image stay together, so that a cut between images parts the samples into independent ones.
    """
    tasks: dict[str, list[list[int]]] = {}
    for rows in image_groups(samples):
        tasks.setdefault(samples[rows[0]].task, []).append(rows)
    for own in tasks.values():
        random.Random(seed).shuffle(own)
    # Each image at its share of the way through its task: small tasks spread over the whole.
    placed = [((i + 0.5) / len(own), task, rows) for task, own in tasks.items() for i, rows in enumerate(own)]
    return [samples[row] for _, _, rows in sorted(placed, key=lambda item: item[:2]) for row in rows]


def samples_digest(samples: Sequence[Sample]) -> str:
    """A short hash that identifies a list of samples by what they ask, show and expect.

    Pictures count by their contents and not by their names: an edited picture is another one, a renamed one is not.
    """
    hashed = hashlib.sha256()
    for sample in samples:
        texts: list[object] = [sample.question, sample.answer, sample.task, sample.answers]
        # Only where they are said, so that journals of older samples stay valid.
        texts += [[sample.earlier, sample.fresh]] if sample.earlier else []
        texts += [[sample.clip.start, sample.clip.end]] if sample.clip else []
        hashed.update(json.dumps([*texts, [_picture_digest(image) for image in sample.images]]).encode())
    return hashed.hexdigest()[:16]


def _picture_digest(image: Picture.Image | Path | bytes) -> str:
    if isinstance(image, Path):
        return sha256(image)
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return f"{image.mode} {image.size} {hashlib.sha256(image.tobytes()).hexdigest()}"
