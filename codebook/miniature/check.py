"""The miniature's own check: whether it ranks pruners, and down to which layer it reads the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from codebook.inference.respond import Policy
from codebook.inference.samples import Sample
from codebook.pruning import DivPrune, Drop, Pruner, Random, Schedule, Stage, Uniform, VisualTokens

CHECK_KEEPS = (0.5, 0.25, 0.11)
"""Budgets of the check's rows."""


class Oracle(Pruner):
    """Keep the visual tokens that the answer needs and fill up with random ones; of too many, keep some at random.

    Parameters
    ----------
    patches
        The tokens that the answer needs, for each image in the order in which the images will be pruned.
    """

    def __init__(self, patches: Iterator[list[int]]) -> None:
        self.patches, self.random = patches, Random()

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        needed = torch.zeros(tokens.grid[0] * tokens.grid[1], dtype=torch.bool, device=tokens.ordinal.device)
        needed[next(self.patches)] = True
        order = self.random.score(tokens).argsort()
        first = (~needed[tokens.ordinal[order]]).long().argsort(stable=True)
        return order[first[:keep]].sort().values


def check_plans(layers: int) -> dict[str, Policy]:
    """The check's rows: baselines and an oracle at three budgets, and no visual token from each layer on.

    Parameters
    ----------
    layers
        Number of decoder layers.
    """
    rows: dict[str, Policy] = {"unpruned": lambda asked: None}
    for keep in CHECK_KEEPS:
        rows[f"oracle {keep}"] = partial(_oracle, keep)
        for name, pruner in (("divprune", DivPrune()), ("uniform", Uniform()), ("random", Random())):
            rows[f"{name} {keep}"] = partial(_fixed, Stage(0, keep, pruner))
    return rows | {f"none from layer {i}": partial(_fixed, Stage(i, 0, Drop())) for i in range(1, layers)}


def _oracle(keep: float, asked: Sequence[Sample]) -> Schedule:
    return Schedule([Stage(0, keep, Oracle(p for q in asked for p in q.patches))])


def _fixed(stage: Stage, asked: Sequence[Sample]) -> Schedule:
    return Schedule([stage])
