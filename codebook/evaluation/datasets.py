"""Public data sets, read from their own files on disk."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter

from codebook.errors import CodebookError, named_line, quoted, unknown
from codebook.evaluation.clip_sets import check_clips, mvbench, videomme
from codebook.evaluation.documents import CHOICE, SHORT, chair, chartqa, docvqa, infovqa, ocrbench, read_checked
from codebook.evaluation.metrics import ACCURACY, CHAIR, MME, POPE, Task, says_yes, yes_or_no
from codebook.evaluation.parquet import Columns, fetched_files, load_parquet, parquet_files
from codebook.evaluation.scorers import box_overlap, check_people, letter, named, same, vqa
from codebook.inference.captions import CaptionScorer
from codebook.inference.samples import Sample, check_images, read_samples
from codebook.store.clips import FrameRule
from codebook.store.pictures import even_frames
from codebook.store.reading import is_file, is_folder, read_lines, read_whole

BOX = "Please provide the bounding box coordinate of the region this sentence describes: "
"""LLaVA-1.5's prompt for boxes (arXiv 2310.03744); what its answers are fractions of is said in docs/bench.md."""

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

EASY_ANSWERS = {
    "yes-no": ("yes", "no"),
    "shape": ("circle", "rectangle", "triangle"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}
"""The thirteen answers of easy-VQA, by what their questions ask for."""

TEXTS_OF_SAMPLE = TypeAdapter(tuple[str, str, tuple[str, ...]])

Loader = Callable[[Path], Iterator[Sample]]
"""Reads the samples of a data set from the folder of its files."""

Generator = Callable[[str, int | None, int], list[Sample]]
"""Makes samples from the text after a name's colon, the number of samples per task (None: its default) and a seed."""


def load_tasks(
    names: Sequence[str],
    count: int | None = None,
    seed: int = 0,
    generators: Mapping[str, Generator] = MappingProxyType({}),
    rule: FrameRule = even_frames,
) -> list[Task]:
    """The tasks of several data sets.

    Parameters
    ----------
    names
        A JSONL file, as `codebook.inference.samples.read_samples` takes it; `name:folder`, with the name of one of
        LOADERS and the folder of its files; or a name among `generators`, alone or with a colon and more behind it.
    count
        Most samples per task, drawn image by image; a generator makes exactly as many.
    seed
        Seed of the draw, and of the generators.
    generators
        Data sets that are made instead of read, by name.
    rule
        Chooses the frames of the mp4 and webm files that a JSONL file names.

    Raises
    ------
    CodebookError
        If a file or an answer is missing, a file cannot be read, or two data sets have a task of the same name.
    """
    tasks: dict[str, Task] = {}
    for name in names:
        for task in _tasks(name, count, seed, generators, rule):
            if task.name in tasks:
                raise CodebookError(f"two data sets have a task {task.name!r}: run them one by one")
            tasks[task.name] = task
    return list(tasks.values())


def _tasks(
    name: str, count: int | None, seed: int, generators: Mapping[str, Generator], rule: FrameRule
) -> Iterator[Task]:
    kind, _, folder = name.partition(":")
    metric = {"pope": POPE, "mme": MME}.get(kind, ACCURACY)  # but captions have one of their own
    if kind in generators:
        samples = generators[kind](folder, count, seed)
        count = None
    elif kind in LOADERS and folder:
        samples = _read_dataset(kind, Path(folder), LOADERS[kind])
    elif kind in CLIP_LOADERS and folder:
        samples = _read_dataset(kind, Path(folder), lambda place: CLIP_LOADERS[kind](place, rule))
    elif kind in TABLES and folder:
        place, _, rest = folder.partition("?")
        columns = Columns.parse(rest)
        if kind == "parquet" and (columns.split or columns.config):
            raise CodebookError(
                f"split and config choose files of hub:, and all of {place} are read: name those to read"
            )
        files = fetched_files(place, columns) if kind == "hub" else parquet_files(Path(place))
        drawn = None if columns.figure else count  # figures whole, and with them whole sets of questions
        called = place.partition("/")[2] if kind == "hub" else Path(place).name.removesuffix(".parquet")
        samples = load_parquet(files, columns, called, drawn, seed)
        metric, count = columns.metric, count if drawn is None else None
    elif kind in TABLES:
        raise CodebookError(f"say which: --data {kind}:{TABLES[kind]}")
    elif kind in LOADERS or kind in CLIP_LOADERS:
        raise CodebookError(f"say where the files of {kind} are: --data {kind}:FOLDER")
    elif is_file(Path(name)):
        samples = read_samples(Path(name), rule)
    else:
        known = [*generators, *LOADERS, *CLIP_LOADERS, *TABLES]
        raise unknown("no data", kind, known, "give a JSONL file, or what `codebook bench --help` names")
    named: dict[str, list[Sample]] = {}
    for sample in samples:
        if not any(answer.strip() for answer in sample.answers or (sample.answer or "",)):
            raise CodebookError(
                f"{name}: the question {quoted(sample.question)} has no answer to score against: add one, or use a "
                "split that has answers"
            )
        named.setdefault(sample.task, []).append(sample)
    for task, own in named.items():
        captions = all(isinstance(sample.scorer, CaptionScorer) for sample in own)
        yield _draw_groups(Task(task, own, CHAIR if captions else metric), count, seed)


def _draw_groups(task: Task, count: int | None, seed: int) -> Task:
    """The task with at most `count` samples: of each image all its samples or none."""
    if count is None or count >= len(task.samples):
        return task
    groups = task.groups
    random.Random(seed).shuffle(groups)
    rows: list[int] = []
    for group in groups:
        if len(rows) + len(group) <= count or not rows:
            rows += group
    return replace(task, samples=[task.samples[row] for row in sorted(rows)])


def _read_dataset(kind: str, folder: Path, loader: Loader) -> list[Sample]:
    if not is_folder(folder):
        raise CodebookError(f"no folder {folder}: give the one with the files of {kind}")
    try:
        samples = list(loader(folder))
        for sample in samples:
            TEXTS_OF_SAMPLE.validate_python((sample.question, sample.answer, sample.answers))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        reason = named_line(error)
        raise CodebookError(f"the files in {folder} are not those of {kind}: {reason}; see docs/bench.md") from None
    if not samples:
        raise CodebookError(f"{folder} holds no questions of {kind}: see docs/bench.md for the files")
    check_images(samples, kind, folder)
    check_clips(samples)
    return samples


def _json(path: Path) -> Any:
    return read_checked([path], Any)


def _text(path: Path) -> str:
    return read_whole(_there(path), "download it again").decode("utf-8-sig")


def _there(path: Path) -> Path:
    if not is_file(path):
        raise CodebookError(f"no file {path}: see docs/bench.md for the files")
    return path


def _by_id(file: Path, records: Sequence[Any], key: str) -> dict[Any, Any]:
    """Records by their id, of which no two may have the same."""
    found = {record[key]: record for record in records}
    if len(found) < len(records):
        raise CodebookError(f"{file}: two records have one {key}; download it again")
    return found


def _annotated(image: Path, question: str, answers: Sequence[str], task: str, suffix: str = SHORT) -> Sample:
    """A question with the answers of several people; the most frequent stands for them."""
    check_people(answers)
    return Sample((image,), question + suffix, max(answers, key=answers.count), task, vqa, tuple(answers))


def _vqav2(folder: Path) -> Iterator[Sample]:
    questions = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    asked = _by_id(questions, _json(questions)["questions"], "question_id")
    answered = folder / "v2_mscoco_val2014_annotations.json"
    for number, record in _by_id(answered, _json(answered)["annotations"], "question_id").items():
        question = asked[number]["question"]
        image = folder / "val2014" / f"COCO_val2014_{record['image_id']:012d}.jpg"
        yield _annotated(image, question, [answer["answer"] for answer in record["answers"]], "vqav2")


def _gqa(folder: Path) -> Iterator[Sample]:
    for record in _json(folder / "testdev_balanced_questions.json").values():
        image = folder / "images" / f"{record['imageId']}.jpg"
        yield Sample((image,), record["question"] + SHORT, record["answer"], "gqa", same)


def _textvqa(folder: Path) -> Iterator[Sample]:
    for record in _json(folder / "TextVQA_0.5.1_val.json")["data"]:
        image = folder / "train_images" / f"{record['image_id']}.jpg"
        yield _annotated(image, record["question"], record["answers"], "textvqa")


def _vizwiz(folder: Path) -> Iterator[Sample]:
    hint = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
    for record in _json(folder / "val.json"):
        answers = [answer["answer"] for answer in record["answers"]]
        yield _annotated(folder / "val" / record["image"], record["question"], answers, "vizwiz", hint)


def _pope(folder: Path) -> Iterator[Sample]:
    for split in ("random", "popular", "adversarial"):
        file = folder / f"coco_pope_{split}.json"
        for _, record in read_lines(_there(file), "download it again"):
            image, label = folder / "val2014" / record["image"], {"yes": "yes", "no": "no"}[record["label"]]
            yield Sample((image,), record["text"] + SHORT, label, f"pope {split}", _pope_score)


def _pope_score(prediction: str, answers: Sequence[str]) -> float:
    return float(says_yes(prediction) == (answers[0] == "yes"))


def _mme(folder: Path) -> Iterator[Sample]:
    for category in (*PERCEPTION, *COGNITION):
        own = folder / category
        if not own.is_dir():
            raise CodebookError(f"no folder {own}: see docs/bench.md for the files")
        texts = own / "questions_answers_YN" if (own / "questions_answers_YN").is_dir() else own
        images = own / "images" if (own / "images").is_dir() else own
        shown = {path.stem: path for path in sorted(images.iterdir()) if path.suffix.lower() in (".jpg", ".png")}
        for file in sorted(texts.glob("*.txt")):
            for line in _text(file).split("\n"):  # other line ends may stand in a question
                if line.strip():
                    question, answer = line.rstrip().split("\t")
                    label = {"yes": "yes", "no": "no"}[answer.strip().lower()]
                    yield Sample((shown[file.stem],), question + SHORT, label, f"mme {category}", yes_or_no)


def _refcoco(folder: Path) -> Iterator[Sample]:
    for split in ("val", "testA", "testB"):
        file = folder / f"finetune_refcoco_{split}.json"
        if not file.exists() and split != "val":
            continue
        record = _json(file)
        boxes = _by_id(file, record["annotations"], "image_id")
        for number, image in _by_id(file, record["images"], "id").items():
            left, top, width, height = boxes[number]["bbox"]
            sides = image["width"], image["height"]
            corners = (left / sides[0], top / sides[1], (left + width) / sides[0], (top + height) / sides[1])
            answer = f"[{', '.join(f'{x:.3f}' for x in corners)}]"
            path = folder / "train2014" / image["file_name"]
            yield Sample((path,), BOX + image["caption"], answer, f"refcoco {split}", box_overlap)


def _ai2d(folder: Path) -> Iterator[Sample]:
    listed = folder / "ai2d_test_ids.csv"
    for name in _text(listed).split():
        name = name.removesuffix(".png")
        for question, record in _json(folder / "questions" / f"{name}.png.json")["questions"].items():
            texts = record["answerTexts"]
            letters = "ABCD"[: len(texts)]
            options = "".join(f"\n{x}. {text}" for x, text in zip(letters, texts, strict=True))
            answer = letters[record["correctAnswer"]]
            yield Sample((folder / "images" / f"{name}.png",), question + options + CHOICE, answer, "ai2d", letter)


def _easyvqa(folder: Path) -> Iterator[Sample]:
    # As they stand: the answers are single words without being asked to be.
    kinds = {answer: kind for kind, among in EASY_ANSWERS.items() for answer in among}
    rules = {kind: partial(named, among=among) for kind, among in EASY_ANSWERS.items()}
    for question, answer, number in _json(folder / "test" / "questions.json"):
        kind = kinds[answer]
        yield Sample((folder / "test" / "images" / f"{number}.png",), question, answer, f"easyvqa {kind}", rules[kind])


CLIP_LOADERS: dict[str, Callable[[Path, FrameRule], Iterator[Sample]]] = {"mvbench": mvbench, "videomme": videomme}
"""Data sets of clips; the rule chooses the frames."""

TABLES = {"parquet": "FILE_OR_FOLDER[?column=name&...]", "hub": "OWNER/NAME[@REVISION][?split=test&column=name&...]"}
"""Data sets in Parquet's form: what stands behind the colon."""

LOADERS: dict[str, Loader] = {
    "ai2d": _ai2d,
    "chair": chair,
    "chartqa": chartqa,
    "docvqa": docvqa,
    "easyvqa": _easyvqa,
    "gqa": _gqa,
    "infovqa": infovqa,
    "mme": _mme,
    "ocrbench": ocrbench,
    "pope": _pope,
    "refcoco": _refcoco,
    "textvqa": _textvqa,
    "vizwiz": _vizwiz,
    "vqav2": _vqav2,
}
