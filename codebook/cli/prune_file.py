"""`codebook prune --input`: a file of questions, answered in batches; a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from codebook import models
from codebook.cli.options import Loading
from codebook.cli.output import describe, note, note_costs, progress
from codebook.errors import CodebookError, counted, out_of_memory, printable
from codebook.evaluation.rows import schedule_key
from codebook.inference.ask import Answer, ask
from codebook.inference.prompts import check_question
from codebook.inference.samples import check_one_kind
from codebook.models.base import Model, Processor
from codebook.pruning import Schedule
from codebook.pruning.plan import Plan
from codebook.store.files import replacing
from codebook.store.journal import Journal
from codebook.store.pictures import read_image
from codebook.store.reading import is_file, read_lines, sha256

QUESTION_FORMAT = 'write {"image": "file.png", "question": "..."}'

Line = tuple[int, dict[str, Any]]
"""A line's number in the file, and its record."""


def prune_file(
    name: str,
    plan: Plan,
    source: Path,
    output: Path,
    batch: int,
    max_new_tokens: int,
    strict: bool,
    loading: Loading,
    as_json: bool,
) -> None:
    """Answer the questions of a file with a model, and write its lines with their answers to another.

    Raises
    ------
    CodebookError
        If the file holds no questions, none can be answered, or with `strict` one cannot.
    """
    lines = list(read_questions(source))
    if not lines:
        raise CodebookError(f"{source} holds no questions: {QUESTION_FORMAT}, one per line")
    folder = source.parent
    if not any(all(is_file(folder / image) for image in _line_images(line)) for _, line in lines):
        raise CodebookError(
            f"no question of {source} has its images, not even {folder / _line_images(lines[0][1])[0]}: "
            "paths are relative to the file"
        )
    model, processor = loading.load(name)
    schedule = plan.apply(model)
    about = models.identities(model, processor) | {
        "schedule": schedule_key(schedule),
        "seed": plan.seed,
        "max_new_tokens": max_new_tokens,
    }
    answer_lines = partial(_answer_batch, model, processor, schedule, max_new_tokens, folder)
    results: list[dict[str, Any]] = []
    with (
        Journal(output.with_name(f"{output.name}.sqlite"), about, output="--output") as journal,
        progress("prune", len(lines), "questions") as tick,
    ):
        for start in range(0, len(lines), batch):
            # A batch is the unit of the journal: its answers could differ in the last bit beside other questions.
            group = lines[start : start + batch]
            key = _digest(group, folder)
            found = journal[key] if key in journal else answer_lines(group)
            failed = _failures(group, found)
            if strict and failed:
                raise CodebookError(failed[0])
            if key not in journal:
                journal.add(key, found)
            results += found
            tick(len(results))
        with replacing(output) as temporary, temporary.open("w") as out:
            for (_, line), result in zip(lines, results, strict=True):
                # An output may be the next run's input: what it said about its own run is of no interest.
                given = {k: v for k, v in line.items() if k not in ("answer", "kept", "error")}
                out.write(json.dumps(given | result) + "\n")
        journal.remove()

    failed = _failures(lines, results)
    for wrong in failed:
        note(f"skipped: {wrong}")
    report = describe(model, schedule) | {"questions": len(lines), "failed": len(failed), "output": str(output)}
    if as_json:
        print(json.dumps(report))
    else:
        print(printable(f"{counted(len(lines) - len(failed), 'answer')} in {output}, {len(failed)} skipped"))
        note_costs(report, [])
    if len(failed) == len(lines):
        raise CodebookError(f"no question of {source} was answered; {failed[0]}")


def read_questions(source: Path) -> Iterator[Line]:
    """The records of a JSONL file, each with `image` or `images`, and `question`; a line of another form is refused."""
    for number, record in read_lines(source, QUESTION_FORMAT):
        try:
            images, question = _line_images(record), record["question"]
            good = isinstance(images, list) and images and all(isinstance(image, str) for image in images)
            good = good and isinstance(question, str)
        except (KeyError, TypeError):
            good = False
        if not good:
            raise CodebookError(f"{source}, line {number}: {QUESTION_FORMAT}")
        check_one_kind(record, source, number)
        yield number, record


def _line_images(line: dict[str, Any]) -> Any:
    """The names of a line's pictures, from `images` or `image`."""
    return line["images"] if "images" in line else [line["image"]]


def _digest(group: Sequence[Line], folder: Path) -> str:
    """A hash of a batch's questions and of its pictures' bytes."""
    parts = []
    for _, line in group:
        pictures = []
        for image in _line_images(line):
            try:
                pictures.append(sha256(folder / image) if is_file(folder / image) else None)
            except CodebookError:  # as of a file that may not be read: its line says so
                pictures.append(None)
        parts.append([line["question"], _line_images(line), pictures])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _failures(lines: Sequence[Line], results: Sequence[dict[str, Any]]) -> list[str]:
    return [f"line {number}: {r['error']}" for (number, _), r in zip(lines, results, strict=True) if "error" in r]


def _answer_batch(
    model: Model,
    processor: Processor,
    schedule: Schedule,
    max_new_tokens: int,
    folder: Path,
    group: Sequence[Line],
) -> list[dict[str, Any]]:
    """Per line its answer and the number of tokens kept per image, or what is wrong with the line.

    Raises
    ------
    CodebookError
        If no line of several can be answered, all for the same reason.
    """
    results: dict[int, dict[str, Any]] = {}
    pictures: dict[int, list[Image.Image]] = {}

    def fail(row: int, error: Exception) -> None:
        if isinstance(error, OSError) or out_of_memory(error):
            raise error  # of the machine, not of the line
        reason = str(error) if isinstance(error, CodebookError) else printable(f"{type(error).__name__}: {error}", 300)
        results[row] = {"error": reason}

    def answer(rows: Sequence[int]) -> list[Answer]:
        questions = [group[row][1]["question"] for row in rows]
        return ask(model, processor, [pictures[row] for row in rows], questions, schedule, max_new_tokens)

    for row, (_, line) in enumerate(group):
        try:
            check_question(model, processor, line["question"])
            pictures[row] = [read_image(folder / image) for image in _line_images(line)]
        except (CodebookError, ValueError) as error:
            fail(row, error)
    rows = sorted(pictures)
    answers: dict[int, Answer] = {}
    try:
        answers = dict(zip(rows, answer(rows) if rows else [], strict=True))
    except Exception as error:
        if isinstance(error, OSError) or out_of_memory(error):
            raise
        # One of them cannot be asked: each by itself, to find out which.
        for row in rows:
            try:
                [answers[row]] = answer([row])
            except Exception as own:
                fail(row, own)
        if len(rows) > 1 and not answers and len({results[row]["error"] for row in rows}) == 1:
            raise  # the model's or the schedule's fault, not the lines'
    for row, found in answers.items():
        results[row] = {"answer": found.text, "kept": [len(kept) for kept in found.kept]}
    return [results[row] for row in range(len(group))]
