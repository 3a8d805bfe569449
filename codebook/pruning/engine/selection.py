"""What a stage keeps: pure functions from units and a pruner to indices, and to what the kept tokens stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from codebook.errors import CodebookError
from codebook.models import Image
from codebook.pruning.engine.prompt import Unit
from codebook.pruning.methods.base import FeaturePruner, Pruner, nearest_kept
from codebook.pruning.stage import Stage
from codebook.pruning.tokens import VisualTokens


def targets(
    stage: Stage, images: Sequence[Image], units: Sequence[Unit], portions: Sequence[float]
) -> list[int | None]:
    """How many tokens of each unit stay; None where the pruner decides.

    An image has one quota, from its unpruned count and its portion. Its units share it in proportion to what they still
    have.
    """
    if stage.keep is None:
        return [None] * len(units)
    out: list[int | None] = []
    for number, image in enumerate(images):
        now = [unit.count for unit in units if unit.image == number]
        target = stage.count(image.count)
        if portions and target:
            target = min(image.count, max(1, round(target * portions[number])))
        if target > sum(now) and any(now):
            raise CodebookError(
                f"the stage at layer {stage.layer} keeps {target} visual tokens, but only {sum(now)} are left"
            )
        out += apportioned(min(target, sum(now)), now)
    return out


def apportioned(total: int, among: list[int]) -> list[int]:
    """A number divided in proportion, largest remainders rounded up: no share is more than what it is a share of."""
    if not total:
        return [0] * len(among)
    whole = sum(among)
    shares = [total * part // whole for part in among]
    order = sorted(range(len(among)), key=lambda i: (-(total * among[i] % whole), i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def choose(
    pruner: Pruner, units: Sequence[Unit], counts: Sequence[int | None], tokens: Callable[[int], VisualTokens]
) -> list[Tensor | None]:
    """For each unit the indices (int64, ascending) of its tokens that stay; None where all do.

    Parameters
    ----------
    counts
        How many stay of each, as `targets` gives them.
    tokens
        What the pruner sees of a unit, by its number.
    """
    together = _choose_together(pruner, units, counts)
    return [
        together[number] if number in together else _choose_alone(pruner, unit, count, number, tokens)
        for number, (unit, count) in enumerate(zip(units, counts, strict=True))
    ]


def _choose_alone(
    pruner: Pruner, unit: Unit, count: int | None, number: int, tokens: Callable[[int], VisualTokens]
) -> Tensor | None:
    if count == 0:
        return unit.ordinal[:0]
    if not unit.count or count == unit.count:
        return None
    index = pruner.choose(tokens(number)) if count is None else pruner.select(tokens(number), count)
    return None if len(_checked(pruner, index, count)) == unit.count else index


def _choose_together(pruner: Pruner, units: Sequence[Unit], counts: Sequence[int | None]) -> dict[int, Tensor]:
    """What stays of units for which a pruner can choose at once: those of as many tokens that keep as many."""
    if not isinstance(pruner, FeaturePruner):
        return {}
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (unit, count) in enumerate(zip(units, counts, strict=True)):
        if count and count < unit.count:
            alike.setdefault((unit.count, count), []).append(number)
    chosen: dict[int, Tensor] = {}
    for (_, keep), numbers in alike.items():
        features = torch.stack([units[number].features for number in numbers])
        for number, index in zip(numbers, pruner.select_each(features, keep), strict=True):
            chosen[number] = _checked(pruner, index, keep)
    return chosen


def _checked(pruner: Pruner, index: Tensor, count: int | None) -> Tensor:
    # Shapes only: looking at the values would make the host wait for the device.
    if index.shape != (count or len(index),) or not len(index):
        wanted = "at least one was" if count is None else f"{count} were"
        raise CodebookError(f"{type(pruner).__name__} chose {tuple(index.shape)} tokens where {wanted} asked for")
    return index


def mass(stage: Stage, unit: Unit, index: Tensor, hidden: Tensor) -> Tensor | None:
    """How many tokens each of a unit's kept tokens stands for, from the hidden states (n, d) of all of them."""
    if not stage.mass or not len(index):  # of a crop or frame that loses everything, none stays to stand for it
        return None if unit.mass is None else unit.mass[index]
    before = torch.ones_like(unit.ordinal) if unit.mass is None else unit.mass
    return before.new_zeros(len(index)).index_add(0, nearest_kept(hidden, index), before)
