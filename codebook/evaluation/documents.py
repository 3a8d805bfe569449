"""Public data sets of documents, charts, text in pictures, and captions, read from their own files on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from codebook.errors import CodebookError
from codebook.evaluation.scorers import anls, contains, relaxed
from codebook.inference.captions import CaptionScorer, Vocabulary
from codebook.inference.samples import Sample, Scorer
from codebook.store.reading import LARGEST_LINES, is_file, read_json, read_whole

SHORT = "\nAnswer the question using a single word or phrase."
"""LLaVA-1.5's prompt for short answers (arXiv 2310.03744)."""
CHOICE = "\nAnswer with the option's letter from the given choices directly."
"""LLaVA-1.5's prompt for options (same paper)."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Letters of options, in their order."""
DESCRIBE = "Please describe this image in detail."
"""Prompt of captions that are searched for objects."""
DOWNLOAD_AGAIN = "download it again, see docs/bench.md for the files"

Texts = Annotated[list[str], Field(min_length=1)]


class PageQuestion(TypedDict):
    """A record of DocVQA."""

    question: str
    answers: Texts
    image: str


class GraphicQuestion(TypedDict):
    """A record of InfoVQA."""

    question: str
    answers: Texts
    image_local_name: str


class PageFile(TypedDict):
    """What is read of DocVQA's file."""

    data: list[PageQuestion]


class GraphicFile(TypedDict):
    """What is read of InfoVQA's file."""

    data: list[GraphicQuestion]


class ChartQuestion(TypedDict):
    """A record of ChartQA."""

    imgname: str
    query: str
    label: str


class TextQuestion(TypedDict):
    """A record of OCRBench."""

    dataset_name: str
    image_path: str
    question: str
    answers: Texts | str


class CocoImage(TypedDict):
    id: int
    file_name: str


class CocoName(TypedDict):
    id: int
    name: str


class CocoObject(TypedDict):
    image_id: int
    category_id: int


class CocoInstances(TypedDict):
    """What is read of COCO's file of instances."""

    images: list[CocoImage]
    categories: list[CocoName]
    annotations: list[CocoObject]


class CocoCaption(TypedDict):
    image_id: int
    caption: str


class CocoCaptions(TypedDict):
    """What is read of COCO's file of captions."""

    annotations: list[CocoCaption]


def read_checked(paths: Sequence[Path], schema: Any) -> Any:
    """The JSON of the first of these files that is there, checked; the error names the file and the place in it."""
    path = next((path for path in paths if is_file(path)), None)
    if path is None:
        raise CodebookError(f"no file {paths[0]}: see docs/bench.md for the files")
    return read_json(path, DOWNLOAD_AGAIN, schema, LARGEST_LINES)


def _first_there(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that is there; the first of all if none is, for the error's text."""
    return next((folder / name for name in names if is_file(folder / name)), folder / names[0])


def docvqa(folder: Path) -> Iterator[Sample]:
    """DocVQA's questions about single pages, val split."""
    found = read_checked([folder / "val_v1.0_withQT.json", folder / "val_v1.0.json"], PageFile)
    for record in found["data"]:
        name = Path(record["image"]).name
        image = _first_there(folder, [f"documents/{name}", f"spdocvqa_images/{name}", f"images/{name}"])
        yield _short(image, record["question"], record["answers"], "docvqa", anls)


def infovqa(folder: Path) -> Iterator[Sample]:
    """InfographicVQA's questions, val split."""
    names = ["infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_val_v1.0.json"]
    for record in read_checked([folder / name for name in names], GraphicFile)["data"]:
        name = Path(record["image_local_name"]).name
        image = _first_there(folder, [f"images/{name}", f"infographicsvqa_images/{name}"])
        yield _short(image, record["question"], record["answers"], "infovqa", anls)


def chartqa(folder: Path) -> Iterator[Sample]:
    """ChartQA's test split, its two parts as two tasks."""
    for part in ("human", "augmented"):
        for record in read_checked([folder / "test" / f"test_{part}.json"], list[ChartQuestion]):
            image = folder / "test" / "png" / Path(record["imgname"]).name
            yield _short(image, record["query"], [record["label"]], f"chartqa {part}", relaxed)


def ocrbench(folder: Path) -> Iterator[Sample]:
    """OCRBench's thousand questions, as they stand."""
    for record in read_checked([folder / "OCRBench.json"], list[TextQuestion]):
        answers = [record["answers"]] if isinstance(record["answers"], str) else record["answers"]
        rule = partial(contains, formula=True) if record["dataset_name"] == "HME100k" else contains
        image = folder / "OCRBench_Images" / record["image_path"]
        yield Sample((image,), record["question"], answers[0], "ocrbench", rule, tuple(answers))


def _short(image: Path, question: str, answers: Sequence[str], task: str, rule: Scorer) -> Sample:
    return Sample((image,), question + SHORT, answers[0], task, rule, tuple(answers))


def chair(folder: Path) -> Iterator[Sample]:
    """COCO's pictures with the objects that are in them: its instances, and what its captions name (arXiv 1809.02156).

    Each line of `synonyms.txt` has words for one object, with commas between them, the category's name first.
    """
    instances = read_checked([folder / "instances_val2014.json"], CocoInstances)
    captions = read_checked([folder / "captions_val2014.json"], CocoCaptions)
    words = read_synonyms(folder / "synonyms.txt")
    for what in ("images", "categories"):
        if len({one["id"] for one in instances[what]}) < len(instances[what]):
            raise CodebookError(f"{folder / 'instances_val2014.json'}: two {what} have one id; {DOWNLOAD_AGAIN}")
    categories = {one["id"]: one["name"].lower() for one in instances["categories"]}
    if missing := sorted(set(categories.values()) - set(words.names.values())):
        raise CodebookError(f"{folder / 'synonyms.txt'} has no line for {missing[0]!r}: add one that begins with it")
    shown: dict[int, set[str]] = {image["id"]: set() for image in instances["images"]}
    for number, own in enumerate(instances["annotations"], 1):
        if own["image_id"] not in shown or own["category_id"] not in categories:
            file = folder / "instances_val2014.json"
            raise CodebookError(f"{file}, annotation {number}: it has an unknown image or category; {DOWNLOAD_AGAIN}")
        shown[own["image_id"]].add(categories[own["category_id"]])
    for one in captions["annotations"]:
        if one["image_id"] in shown:
            shown[one["image_id"]].update(words.named(one["caption"]))
    scorer = CaptionScorer(words.count)
    for image in instances["images"]:
        if objects := tuple(sorted(shown[image["id"]])):
            path = folder / "val2014" / Path(image["file_name"]).name
            yield Sample((path,), DESCRIBE, ", ".join(objects), "chair", scorer, objects)


def read_synonyms(path: Path) -> Vocabulary:
    """A file of synonyms: for each line the words that stand for its first one.

    Raises
    ------
    CodebookError
        If the file cannot be read, or a word stands for two objects; the message names the line.
    """
    names: dict[str, str] = {}
    text = read_whole(path, DOWNLOAD_AGAIN).decode("utf-8-sig", "replace")
    for number, line in enumerate(text.split("\n"), 1):
        words = [" ".join(word.lower().split()) for word in line.split(",") if word.strip()]
        for word in words:
            if names.setdefault(word, words[0]) != words[0]:
                raise CodebookError(
                    f"{path}, line {number}: {word!r} stands for {words[0]!r} and for {names[word]!r}: leave one out"
                )
    return Vocabulary(names)
