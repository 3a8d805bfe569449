"""Scores of the miniature's task families."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from codebook import miniature, models
from codebook.errors import CodebookError
from codebook.inference import answer, prepare
from codebook.pruning import Schedule, remember

BATCH = 32

Scores = dict[str, list[float]]
"""For each task family the scores of its questions, 0 to 1."""

Plan = Callable[[Sequence[miniature.Question]], Schedule | None]
"""The schedule for a batch of questions; None leaves the model as it is."""


def score(
    model: Any,
    processor: Any,
    questions: Sequence[miniature.Question],
    schedule: Schedule | None = None,
    done: Callable[[int], None] = lambda count: None,
    *,
    blind: bool = False,
) -> Scores:
    """Answer the questions under a schedule and score them.

    Parameters
    ----------
    done
        Hears how many are answered.
    blind
        Leave the images out of the prompts: what the questions alone give away.
    """
    [scores] = compare(model, processor, questions, {"": lambda asked: schedule}, done=done, blind=blind).values()
    return scores


def compare(
    model: Any,
    processor: Any,
    questions: Sequence[miniature.Question],
    plans: Mapping[str, Plan],
    file: Path | None = None,
    done: Callable[[int], None] = lambda count: None,
    *,
    blind: bool = False,
) -> dict[str, Scores]:
    """Answer the same questions in several ways, encoding each image once.

    Parameters
    ----------
    plans
        The ways, by name.
    file
        Where every finished batch is kept, a JSON line each; called again, the comparison goes on. A file of another
        model, other questions or other plans is refused.
    done
        Hears how many answers there are, of all plans.
    blind
        As in `score`.
    """
    journal = _Journal(file, {
        "model": models.family(model).fingerprint(model), "plans": list(plans),
        "questions": len(questions), "first": [q.question for q in questions[:64]],
    })  # fmt: skip
    results: dict[str, Scores] = {name: {q.family: [] for q in questions} for name in plans}
    answered = 0
    for i, group in enumerate(_batches(questions)):
        found = journal.get(i)
        if found is None:
            images = [() if blind else q.images for q in group]
            prompts = prepare(model, processor, images, [q.question for q in group])
            found = {}
            with remember(model):
                for name, plan in plans.items():
                    answers = answer(model, processor, prompts, plan(group))
                    found[name] = [
                        miniature.score(q.family, a.text, q.answer) for q, a in zip(group, answers, strict=True)
                    ]
                    done(answered := answered + len(group))
            journal.add(i, found)
        else:
            done(answered := answered + len(group) * len(plans))
        for name, values in found.items():
            results[name][group[0].family] += values
    return results


def _batches(questions: Sequence[miniature.Question]) -> Iterator[list[miniature.Question]]:
    """Of one family and one number of images: little padding, and answers of about one length."""
    for _, own in groupby(sorted(questions, key=lambda q: miniature.FAMILIES.index(q.family)), key=lambda q: q.family):
        group = sorted(own, key=lambda q: len(q.images))
        for start in range(0, len(group), BATCH):
            yield group[start : start + BATCH]


class _Journal:
    """Finished batches of a comparison, in memory or in a file of JSON lines."""

    def __init__(self, file: Path | None, about: dict[str, Any]) -> None:
        self.file, self.found = file, {}
        if file is None:
            return
        if file.exists():
            lines = file.read_text().splitlines(keepends=True)
            whole = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill can cut the last one
            if not whole or whole[0] != about:
                raise CodebookError(f"{file} holds another comparison (model, questions or plans): choose another file")
            self.found = {entry["batch"]: entry["scores"] for entry in whole[1:]}
        else:
            whole = [about]
        file.write_text("".join(json.dumps(entry) + "\n" for entry in whole))

    def get(self, batch: int) -> dict[str, list[float]] | None:
        return self.found.get(batch)

    def add(self, batch: int, scores: dict[str, list[float]]) -> None:
        if self.file is not None:
            with self.file.open("a") as out:
                out.write(json.dumps({"batch": batch, "scores": scores}) + "\n")


def family_means(scores: Scores) -> dict[str, float]:
    """Mean accuracy of each family."""
    return {family: statistics.fmean(values) for family, values in scores.items()}


def mean(scores: Scores) -> float:
    """Mean accuracy over the families."""
    return statistics.fmean(family_means(scores).values())


def standard_error(scores: Scores) -> float:
    """Standard error of that mean, from the spread of the questions within each family."""
    variances = [statistics.pvariance(values) / len(values) for values in scores.values()]
    return float(sum(variances) ** 0.5 / len(variances))


def table(rows: Mapping[str, Scores]) -> str:
    """As Markdown: percent, a row a way of answering, a column a family; the mean with its standard error."""
    families = next(iter(rows.values()))
    lines = [f"| | {' | '.join(families)} | mean |", f"|---|{'---|' * (len(families) + 1)}"]
    for name, scores in rows.items():
        cells = [f"{100 * value:.1f}" for value in family_means(scores).values()]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {100 * mean(scores):.1f} ± {100 * standard_error(scores):.1f} |"
        )
    return "\n".join(lines)
