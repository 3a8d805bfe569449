"""`codebook prune --input`: a file of questions, answered in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codebook import models
from codebook.cli.output import describe, note, progress, summary
from codebook.errors import CodebookError
from codebook.inference.ask import Answer, ask
from codebook.pruning.plan import Plan
from codebook.store.files import read_lines, replacing
from codebook.store.pictures import read_image


def prune_file(
    name: str,
    plan: Plan,
    source: Path,
    output: Path,
    batch: int,
    max_new_tokens: int,
    strict: bool,
    device: str | None,
    as_json: bool,
) -> None:
    tasks = list(read_questions(source))
    model, processor = models.load(name, device)
    schedule = plan.apply(model)
    failed = []
    with (
        replacing(output) as temporary,
        temporary.open("w") as out,
        progress("prune", len(tasks), "questions") as tick,
    ):
        for start in range(0, len(tasks), batch):
            group, pictures = tasks[start : start + batch], []
            errors: list[str | None] = []
            for task in group:
                try:
                    pictures.append([read_image(source.parent / image) for image in task["images"]])
                    errors.append(None)
                except CodebookError as error:
                    if strict:
                        raise
                    errors.append(str(error))
            questions = [task["question"] for task, error in zip(group, errors, strict=True) if error is None]
            answers: Iterator[Answer] = iter(
                ask(model, processor, pictures, questions, schedule, max_new_tokens) if questions else []
            )
            for task, wrong in zip(group, errors, strict=True):
                record = {k: v for k, v in task.items() if k != "images"}
                if wrong is None:
                    answer = next(answers)
                    record |= {"answer": answer.text, "kept": [len(kept) for kept in answer.kept]}
                else:
                    failed.append(wrong)
                    record["error"] = wrong
                out.write(json.dumps(record) + "\n")
            tick(start + len(group))
    for wrong in failed:
        note(f"skipped: {wrong}")
    report = describe(model, schedule) | {
        "questions": len(tasks),
        "failed": len(failed),
        "output": str(output),
    }
    if as_json:
        print(json.dumps(report))
    else:
        print(f"{len(tasks) - len(failed)} answers in {output}, {len(failed)} skipped")
        note(summary(report, []))


def read_questions(source: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file, each with `images` (paths) and `question`, all of them checked first."""
    for number, record in read_lines(source, "give a JSONL file"):
        try:
            images = record["images"] if "images" in record else [record["image"]]
            question = record["question"]
            good = images and all(isinstance(image, str) for image in images) and isinstance(question, str)
        except (KeyError, TypeError):
            good = False
        if not good:
            raise CodebookError(f'{source}, line {number}: write {{"image": "file.png", "question": "..."}}')
        yield record | {"images": images}
