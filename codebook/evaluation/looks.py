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
    """The first `count` samples by their place in their task; of those at the last place, spread over the tasks."""
    found: list[Sample] = []
    for place in range(max((len(task.samples) for task in tasks), default=0)):
        own = [task.samples[place] for task in tasks if place < len(task.samples)]
        left = min(count - len(found), len(own))
        found += [own[i * len(own) // left] for i in range(left)]
    return found


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
    about = models.identities(model, processor) | {"max_new_tokens": max_new_tokens}
    with Journal(file, about) as journal:
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
            asked = {"task": sample.task, "question": sample.question, "answer": sample.answer}
            found.append({**asked, "grids": grids, "rows": views})
    return found
