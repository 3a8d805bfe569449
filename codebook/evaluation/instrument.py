"""Does the miniature rank pruners, and how deep does it read the image? The instrument's own check."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codebook import miniature, models
from codebook.errors import CodebookError
from codebook.evaluation.scores import Scores, score
from codebook.pruning import DivPrune, Drop, Pruner, Random, Schedule, Stage, Uniform, VisualTokens

KEEPS = (0.5, 0.25, 0.11)

Table = dict[str, Scores]
"""For each way of pruning the scores of every question, by task family."""


class Oracle(Pruner):
    """Keeps the visual tokens that the answer needs and fills up with random ones; of too many, it keeps random ones.

    Parameters
    ----------
    patches
        Those of each image, in the order in which the images will be pruned.
    """

    def __init__(self, patches: Iterator[list[int]]) -> None:
        self.patches, self.random = patches, Random()

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        needed = torch.zeros(tokens.grid[0] * tokens.grid[1], dtype=torch.bool, device=tokens.ordinal.device)
        needed[next(self.patches)] = True
        order = self.random.score(tokens).argsort()
        first = (~needed[tokens.ordinal[order]]).long().argsort(stable=True)
        return order[first[:keep]].sort().values


def plans(layers: int) -> dict[str, Callable[[list[miniature.Question]], Schedule | None]]:
    """The check's rows by name, each a function of the questions that will be asked."""

    def flat(pruner: Pruner, keep: float) -> Callable[[list[miniature.Question]], Schedule]:
        return lambda asked: Schedule([Stage(0, keep, pruner)])

    def oracle(keep: float) -> Callable[[list[miniature.Question]], Schedule]:
        return lambda asked: Schedule([Stage(0, keep, Oracle(p for q in asked for p in q.patches))])

    def none_from(layer: int) -> Callable[[list[miniature.Question]], Schedule]:
        return lambda asked: Schedule([Stage(layer, 0, Drop())])

    rows: dict[str, Callable[[list[miniature.Question]], Schedule | None]] = {"unpruned": lambda asked: None}
    for keep in KEEPS:
        rows[f"oracle {keep}"] = oracle(keep)
        rows[f"divprune {keep}"] = flat(DivPrune(), keep)
        rows[f"uniform {keep}"] = flat(Uniform(), keep)
        rows[f"random {keep}"] = flat(Random(), keep)
    return rows | {f"none from layer {layer}": none_from(layer) for layer in range(1, layers)}


def check(
    model: Any,
    processor: Any,
    file: Path,
    count: int,
    seed: int = 0,
    tick: Callable[[int, str], None] = lambda done, name: None,
) -> Table:
    """Prune the miniature by baselines and an oracle, and take all visual tokens from it from each layer on.

    Parameters
    ----------
    file
        Every finished row is written to it; called again, the check goes on. One of another model, count or seed is
        refused.
    count, seed
        Held-out questions a family.
    tick
        Hears how many questions are answered, and the row's name.
    """
    about = {"model": models.family(model).fingerprint(model), "count": count, "seed": seed}
    stored: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {**about, "rows": {}}
    if {key: stored.get(key) for key in about} != about:
        raise CodebookError(f"{file} holds the check of another model, count or seed: choose another file")
    questions = [q for family in miniature.FAMILIES for q in miniature.tasks(family, "test", seed, count)]
    rows = plans(len(model.get_decoder().layers))
    for i, (name, schedule) in enumerate(rows.items()):
        if name in stored["rows"]:
            continue
        answered = partial(_answered, tick, i * len(questions), name)
        scores = score(model, processor, questions, schedule(questions), answered)
        stored["rows"][name] = scores
        draft = file.with_suffix(".writing")
        draft.write_text(json.dumps(stored))
        draft.replace(file)
    return {name: stored["rows"][name] for name in rows}


def _answered(tick: Callable[[int, str], None], before: int, name: str, done: int) -> None:
    tick(before + done, name)


def table(rows: Table) -> str:
    """As Markdown: percent, a column a family."""
    families = next(iter(rows.values()))
    lines = [f"| | {' | '.join(families)} | mean |", f"|---|{'---|' * (len(families) + 1)}"]
    for name, scores in rows.items():
        means = [sum(values) / len(values) for values in scores.values()]
        cells = [f"{100 * value:.0f}" for value in means] + [f"{100 * sum(means) / len(means):.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
