"""What a stage keeps: pure functions from units and a pruner to indices, and to what the kept tokens stand for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from codebook.errors import CodebookError
from codebook.models import Image
from codebook.pruning.engine.prompt import Unit
from codebook.pruning.methods.base import FeaturePruner, FramePruner, Pruner, nearest_kept_each
from codebook.pruning.stage import Stage
from codebook.pruning.tokens import VisualTokens, on_device

OWN = "codebook.pruning.methods"
"""Package of the methods whose choices tests have looked at."""
_looked_at: weakref.WeakSet[type[Pruner]] = weakref.WeakSet()
"""Methods of users whose choices were looked at once."""


def targets(
    stage: Stage, images: Sequence[Image], units: Sequence[Unit], portions: Sequence[float], *, films: bool = False
) -> list[int | None]:
    """How many tokens of each unit stay; None where the pruner decides.

    An image has one quota, from its unpruned count and its portion. Its units share it in proportion to what they still
    have. With `films` the images of one film share the sum of their quotas: a stage so far chose among all its frames.

    Raises
    ------
    CodebookError
        If more are to stay than are left, or if a film is to be made of what is none.
    """
    if stage.keep is None:
        return [None] * len(units)
    quotas = []
    for number, image in enumerate(images):
        target = stage.count(image.count)
        if portions and target:
            target = min(image.count, max(1, round(target * portions[number])))
        quotas.append(target)
    out: list[int | None] = [None] * len(units)
    for members in _film_members(units) if films else _grouped(unit.image for unit in units):
        now = [units[i].count for i in members]
        target = sum(quotas[number] for number in {units[i].image for i in members})
        if target > sum(now) and any(now):
            raise CodebookError(
                f"the stage at layer {stage.layer} keeps {target} visual tokens, but only {sum(now)} are left"
            )
        for i, count in zip(members, apportioned(min(target, sum(now)), now), strict=True):
            out[i] = count
    return out


def _grouped(keys: Iterable[Hashable]) -> list[list[int]]:
    """The numbers of the keys that are equal, group by group, in the order of the first ones."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _film_members(units: Sequence[Unit]) -> list[list[int]]:
    """The numbers of the units of each film."""
    found = _grouped(unit.film for unit in units)
    for members in found:
        if units[members[0]].film is None:
            raise CodebookError(
                "a method that compares frames was given an image that is cut into crops: load the processor with one "
                "view per image, or use another method"
            )
        if len(grids := {units[i].grid for i in members}) > 1:
            shapes = ", ".join(f"{rows} x {cols}" for rows, cols in sorted(grids)[:4])
            raise CodebookError(f"frames of {shapes} tokens cannot be compared: give all images of a prompt one size")
    return found


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
    if isinstance(pruner, FramePruner):
        return _choose_films(pruner, units, counts, tokens)
    together = _choose_together(pruner, units, counts)
    return [
        together[number] if number in together else _choose_alone(pruner, unit, count, number, tokens)
        for number, (unit, count) in enumerate(zip(units, counts, strict=True))
    ]


def _choose_films(
    pruner: FramePruner, units: Sequence[Unit], counts: Sequence[int | None], tokens: Callable[[int], VisualTokens]
) -> list[Tensor | None]:
    """What stays of the frames of each film, whose counts say no more than their sum."""
    chosen: list[Tensor | None] = [None] * len(units)
    for members in _film_members(units):
        keep = sum(counts[i] or 0 for i in members)
        if keep == sum(units[i].count for i in members):
            continue
        none = [units[i].ordinal[:0] for i in members]
        found = pruner.select_frames([tokens(i) for i in members], keep) if keep else none
        if [len(found), sum(map(len, found))] != [len(members), keep]:
            raise CodebookError(
                f"{type(pruner).__name__} chose {sum(map(len, found))} tokens of {len(found)} frames where {keep} of "
                f"{len(members)} were asked for"
            )
        for i, index in zip(members, found, strict=True):
            _check_values(pruner, index, units[i].count)
            chosen[i] = None if len(index) == units[i].count else index
    return chosen


def _choose_alone(
    pruner: Pruner, unit: Unit, count: int | None, number: int, tokens: Callable[[int], VisualTokens]
) -> Tensor | None:
    if count == 0:
        return unit.ordinal[:0]
    if not unit.count or count == unit.count:
        return None
    index = pruner.choose(tokens(number)) if count is None else pruner.select(tokens(number), count)
    return None if len(_checked(pruner, index, count, unit.count)) == unit.count else index


def _choose_together(pruner: Pruner, units: Sequence[Unit], counts: Sequence[int | None]) -> dict[int, Tensor]:
    """What stays of units for which a pruner can choose at once: those of as many tokens that keep as many."""
    if not isinstance(pruner, FeaturePruner):
        return {}
    chosen: dict[int, Tensor] = {}
    for numbers in _grouped((unit.count, count) for unit, count in zip(units, counts, strict=True)):
        keep = counts[numbers[0]]
        if not keep or keep >= units[numbers[0]].count:
            continue
        features = torch.stack([units[number].features for number in numbers])
        for number, index in zip(numbers, pruner.select_each(features, keep), strict=True):
            chosen[number] = _checked(pruner, index, keep, units[number].count)
    return chosen


def _checked(pruner: Pruner, index: Tensor, count: int | None, among: int) -> Tensor:
    """What a pruner chose of so many tokens; raises a CodebookError where it is not what was asked for."""
    if not isinstance(index, Tensor) or index.shape != (count or len(index),) or not len(index):
        wanted = "at least one was" if count is None else f"{count} were"
        found = tuple(index.shape) if isinstance(index, Tensor) else type(index).__name__
        raise CodebookError(f"{type(pruner).__name__} chose {found} tokens where {wanted} asked for")
    _check_values(pruner, index, among)
    return index


def _check_values(pruner: Pruner, index: Tensor, among: int) -> None:
    """Refuse indices of a user's method that are no choice. On a device, where to look at them is to wait, once."""
    kind = type(pruner)
    if kind.__module__.startswith(OWN) or (index.device.type != "cpu" and kind in _looked_at):
        return
    _looked_at.add(kind)
    ascending = index.dtype == torch.int64 and bool((index[1:] > index[:-1]).all())
    if not ascending or (len(index) and not 0 <= int(index[0]) <= int(index[-1]) < among):
        raise CodebookError(
            f"{kind.__name__} chose {index[:4].tolist()} and so on of {among} tokens: give int64 indices, ascending "
            "and without repeats"
        )


@torch.no_grad()
def masses(
    stage: Stage,
    units: Sequence[Unit],
    stays: Sequence[Tensor | None],
    hidden: Tensor,
    places: Sequence[Tensor],
    tokens: Callable[[int], VisualTokens],
) -> list[Tensor | None]:
    """For each unit how many tokens each of those that stay stands for; None where each stands for itself.

    Parameters
    ----------
    stays
        For each unit the indices of its tokens that stay; None where all do.
    hidden : (B, P, d) float
        Hidden states at the stage's layer.
    places : (n,) int64, of each unit
        Where its tokens are in its row of them.
    tokens
        What the pruner saw of a unit, by its number, if it has groups of its own.
    """
    masses = [
        unit.mass if unit.mass is None or index is None else unit.mass[index]
        for unit, index in zip(units, stays, strict=True)
    ]
    if not stage.mass:
        return masses
    # Of a crop or frame that loses everything, none stays to stand for it.
    kept = {number: index for number, index in enumerate(stays) if index is not None and len(index)}
    for number, group in _groups(stage.pruner, units, kept, hidden, places, tokens).items():
        unit = units[number]
        before = torch.ones_like(unit.ordinal) if unit.mass is None else unit.mass
        masses[number] = before.new_zeros(len(kept[number])).index_add_(0, group, before)
    return masses


def _groups(
    pruner: Pruner,
    units: Sequence[Unit],
    kept: Mapping[int, Tensor],
    hidden: Tensor,
    places: Sequence[Tensor],
    tokens: Callable[[int], VisualTokens],
) -> dict[int, Tensor]:
    """By the number of each unit: to which of its kept tokens each of its tokens is counted, (n,) int64."""
    own = type(pruner).groups is not Pruner.groups
    found = {number: pruner.groups(tokens(number), index) if own else None for number, index in kept.items()}
    groups = {number: group for number, group in found.items() if group is not None}
    for number, group in groups.items():
        if group.shape != (count := units[number].count,):
            raise CodebookError(
                f"{type(pruner).__name__} gives groups of shape {tuple(group.shape)} for {count} tokens: give each its"
            )
    rest = [number for number in kept if number not in groups]
    # Units of one size at once: with many images, to say each step is what takes time.
    for same in _grouped((units[number].count, len(kept[number])) for number in rest):
        alike = [rest[place] for place in same]
        first = on_device([units[i].row * hidden.shape[1] for i in alike], hidden.device)
        where = torch.stack([places[i] for i in alike]) + first[:, None]
        nearest = nearest_kept_each(hidden.flatten(0, 1), where, torch.stack([kept[i] for i in alike]))
        groups |= zip(alike, nearest, strict=True)
    return groups
