"""Counts that meet a budget: visual tokens averaged over the decoder layers."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from codebook.errors import CodebookError
from codebook.pruning.stage import Keep, Stage, check_keep, whole

if TYPE_CHECKING:
    from codebook.pruning.schedule import Schedule

SMALLEST_SHARE = 1e-6
"""Smallest fraction that is scaled; shares are told apart to a millionth (`_scaled`)."""


def fit_schedule(schedule: Schedule, keep: Keep, n: int, layers: int) -> Schedule:
    """As `Schedule.fit` says."""
    check_keep(keep)
    schedule.check_layers(layers)
    if schedule.adaptive:
        raise CodebookError(f"'{schedule}' decides how many tokens stay: it cannot be fitted to a budget")
    room = whole((keep * n if isinstance(keep, float) else keep) * layers)  # tokens in one layer
    if len(schedule.stages) == 1 and schedule.stages[0].keep == 0:
        _check_reach(schedule, keep, room, n, n * (layers - 1), n * layers)
        return replace(schedule, stages=[replace(schedule.stages[0], layer=room // n)])
    fractions = [stage.keep for stage in schedule.stages if isinstance(stage.keep, float)]
    if not fractions:
        raise CodebookError(f"'{schedule}' has no fraction to scale, and counts stay: write a share, as in method:1.0")

    if min(fractions) < SMALLEST_SHARE:
        raise CodebookError(
            f"'{schedule}' has a share too small to scale: write {SMALLEST_SHARE:f} or more, or a count"
        )

    def at(t: int) -> Schedule:
        return replace(schedule, stages=_scaled(schedule.stages, n, t))

    def total(t: int) -> int:
        return sum(at(t).counts(n, layers))

    most = math.ceil(n * fractions[0] / min(fractions)) + 1
    _check_reach(schedule, keep, room, total(1), total(most), n * layers)
    return at(bisect.bisect_right(range(1, most + 1), room, key=total))


def fit_shares(schedule: Schedule, keep: Keep, n: int, layers: int) -> Schedule:
    """As `Schedule.fit_images` says."""
    fitted = schedule.fit(keep, n=n, layers=layers)
    if isinstance(keep, int):
        return fitted
    stages = []
    for own, count, share in zip(schedule.stages, fitted.stages, fitted.shares(n).stages, strict=True):
        if isinstance(own.keep, int):
            share = count
        elif (said := replace(share, keep=keep)).count(n) == count.keep:
            share = said  # of one stage before the LLM: `keep` of images of every size, as `Stage` has it
        stages.append(share)
    return replace(fitted, stages=stages)


def _check_reach(schedule: Schedule, keep: Keep, room: int, least: int, most: int, unpruned: int) -> None:
    if not least <= room <= most:
        low, high = math.ceil(10**4 * least / unpruned) / 10**4, math.floor(10**4 * most / unpruned) / 10**4
        raise CodebookError(
            f"keep {keep} is out of reach of '{schedule}': choose from {low:g} to {high:g}, averaged over the layers"
        )


def _scaled(stages: Sequence[Stage], n: int, t: int) -> list[Stage]:
    """The stages with the first fraction scaled to `t` of `n` tokens and the others by the same factor.

    Increasing in `t`, and by no more than one token a stage for each: fractions do not increase from stage to stage.
    """
    # What an author writes as 1/3 or 0.3333, exactly: nothing depends on the rounding of floats.
    shares = [Fraction(s.keep).limit_denominator(10**6) if isinstance(s.keep, float) else None for s in stages]
    first = next(share for share in shares if share)
    out, most = [], n
    for i, (stage, share) in enumerate(zip(stages, shares, strict=True)):
        if share:
            least = max([1, *(after.keep for after in stages[i:] if isinstance(after.keep, int))])
            stage = replace(stage, keep=min(most, max(least, math.floor(t * share / first + Fraction(1, 2)))))
        out.append(stage)
        most = stage.count(n)
    return out


def shortest_share(keep: Keep, n: int) -> float:
    """The smallest fraction of the fewest digits, three or more, that is `keep` of `n` tokens; a fraction itself."""
    if isinstance(keep, float):
        return keep
    return next(
        share for digits in range(3, 17) if whole((share := -(-keep * 10**digits // n) / 10**digits) * n) == keep
    )
