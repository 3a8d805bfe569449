"""A few questions answered under every row of a benchmark, and the tokens that each row kept: what its report shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter
from typing_extensions import TypedDict

from codebook import models
from codebook.evaluation.metrics import Task
from codebook.evaluation.rows import Row, schedule_key
from codebook.inference.conversation import answer_sample
from codebook.inference.records import damaged, read_record
from codebook.inference.respond import remembering
from codebook.inference.samples import Sample, samples_digest
from codebook.models.base import Model, Processor
from codebook.pruning import Schedule
from codebook.store.journal import Journal


class Look(TypedDict):
    """An answer in the journal of samples shown, and the tokens kept for it, for each image."""

    text: str
    kept: list[list[NonNegativeInt]]
    grids: list[tuple[PositiveInt, PositiveInt]]


LOOK = TypeAdapter(Look)
"""An answer to a sample that is shown, in the journal."""


def samples_to_show(tasks: Sequence[Task], count: int) -> list[Sample]:
    """The first sample of each of `count` tasks, which are spread evenly over all tasks."""
    count = min(count, len(tasks))
    return [tasks[i * len(tasks) // count].samples[0] for i in range(count)]


def show_rows(
    model: Model,
    processor: Processor,
    samples: Sequence[Sample],
    rows: Sequence[Row],
    file: Path | None = None,
    max_new_tokens: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Answer a few questions under every row, and note which tokens each row kept.

    Parameters
    ----------
    file
        Journal of the answers: called again, the work goes on.
    done
        Called with the number of answers so far.

    Returns
    -------
    For each sample `task`, `question`, `answer`, `grids` (rows and columns of each image's whole view, or of its first
    frame) and `rows`: for each row `method`, `keep`, `text`, `score` (None without a right answer) and `kept`: for each
    image the raster positions of those tokens of that view that were kept to the end
    """
    model = models.unwrap(model)
    found, count = [], 0
    with Journal(file, {"model": models.identity(model), "max_new_tokens": max_new_tokens}) as journal:
        for sample in samples:
            pictures, views, grids, key = sample.pictures(), [], [], samples_digest([sample])
            with remembering(model):
                for row in rows:
                    schedule = row.schedules[0]
                    name = f"{key} {schedule_key(schedule)}"
                    if name not in journal:
                        answer = answer_sample(model, processor, sample, schedule or Schedule([]), max_new_tokens)
                        seen = [image.view(kept) for image, kept in zip(answer.images, answer.kept, strict=True)]
                        journal.add(
                            name, {"text": answer.text, "kept": [s[0] for s in seen], "grids": [s[1] for s in seen]}
                        )
                    record = read_record(journal, name, LOOK)
                    grids = record["grids"]
                    if not len(grids) == len(record["kept"]) == len(pictures):
                        raise damaged(journal)
                    score = None if sample.answer is None else sample.score(record["text"])
                    own = {"text": record["text"], "score": score, "kept": record["kept"]}
                    views.append({"method": row.method, "keep": row.keep, **own})
                    done(count := count + 1)
            about = {"task": sample.task, "question": sample.question, "answer": sample.answer}
            found.append({**about, "grids": grids, "rows": views})
    return found
