"""Whether a codebook still changes as images are added: by the tokens that it keeps of images set aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from codebook.errors import CodebookError, counted
from codebook.store.codebook import Codebook

KEPT_SHARE = 0.2
"""Share of an image's tokens that are kept in the comparison: those least like any prototype."""
FIRST = 32
"""Images of the first codebook that is compared."""
SET_ASIDE, FEWEST, MOST = 0.1, 4, 32
"""Share of the images that are set aside, and the fewest and the most of them."""


@dataclass(frozen=True)
class Stability:
    """When a build has seen enough images.

    Attributes
    ----------
    agreement
        The least `agreement` between the codebooks of n and of 2n images.
    """

    agreement: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.agreement <= 1:
            raise CodebookError(f"agreement is {self.agreement}: a number above 0 and at most 1 is needed")


def set_aside(order: Sequence[str]) -> tuple[list[str], list[str]]:
    """The images to build from, and those to compare on: the last of a shuffled order.

    Raises
    ------
    CodebookError
        If two codebooks cannot be compared with so few.
    """
    held = min(max(round(SET_ASIDE * len(order)), FEWEST), MOST)
    if len(order) - held <= FIRST:
        raise CodebookError(
            f"{counted(len(order), 'different image')} cannot show whether more would change anything: give more than "
            f"{FIRST + FEWEST}, or leave --until-stable out"
        )
    return list(order[:-held]), list(order[-held:])


def sizes(images: int) -> list[int]:
    """Numbers of images after which codebooks are compared: each twice the one before, and all at last."""
    steps = [FIRST]
    while steps[-1] < images:
        steps.append(min(2 * steps[-1], images))
    return steps


def is_stable(report: dict[str, Any]) -> bool:
    """Whether a build ended because its codebook no longer changed, and not for want of images.

    The last step may add fewer images than there were before, and what they change says nothing.
    """
    before, last = [{"images": 0}, *report["curve"]][-2:]
    doubled = last["images"] >= 2 * before["images"]
    return doubled and last.get("agreement", -1.0) >= report["agreement"]


def kept_tokens(book: Codebook, tokens: Tensor) -> set[int]:
    """The places of an image's tokens (n, d) that are least like any prototype, the share `KEPT_SHARE` of them."""
    order = book.redundancy(tokens).argsort(stable=True)
    return set(order[: max(1, round(KEPT_SHARE * len(tokens)))].tolist())


def agreement(first: Sequence[set[int]], second: Sequence[set[int]], tokens: Sequence[int]) -> float:
    """How far two codebooks keep the same tokens: 1 if everywhere, 0 if no more than two random choices would.

    The mean over images of `(overlap - chance) / (1 - chance)`, where `overlap` is the share of the kept tokens that
    both keep, and `chance` what random choices of as many share on average.

    Parameters
    ----------
    first, second
        Per image the places that a codebook keeps, as many in both.
    tokens
        Per image the number of its tokens.
    """
    values = []
    for a, b, n in zip(first, second, tokens, strict=True):
        chance = len(a) / n
        values.append(1.0 if chance == 1 else (len(a & b) / len(a) - chance) / (1 - chance))
    return round(sum(values) / len(values), 6)
