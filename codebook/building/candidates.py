"""Which of an image's visual tokens are probed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from codebook.errors import CodebookError

# (first rank, how many), 0-based, of 576 tokens ranked by similarity to [CLS]: 96 in all, as in the authors' code
BANDS = ((0, 24), (36, 8), (72, 8), (144, 8), (216, 8), (288, 8), (360, 8), (432, 8), (504, 8), (568, 8))
BANDS_OF = 576
FEW = 24
"""Candidates of an image below which, in a model that nothing is published for, every token is probed."""


def candidates(kind: str, grid: tuple[int, int], patches: Tensor, cls: Tensor | None) -> Tensor:
    """The tokens of one image that are probed.

    Parameters
    ----------
    kind
        `ranks`: bands of ranks by cosine similarity to [CLS]; `tiles`: centres of the 3x3 tiles; `all`; `auto`:
        ranks where the tower has a [CLS] token, else tiles.
    grid
        Rows and columns of the visual tokens.
    patches : (n, D)
        Tower features before the projector.
    cls : (D,) or None
        The [CLS] feature of the same layer; None where the tower has none.

    Returns
    -------
    (m,) int64, in raster order
    """
    rows, cols = grid
    if kind == "auto":
        kind = "tiles" if cls is None else "ranks"
    if kind == "all":
        return torch.arange(rows * cols)
    if kind == "tiles":
        return torch.tensor(centres(grid))
    if cls is None:
        raise CodebookError("this model's tower has no [CLS] token to rank by: set candidates to tiles or all")
    similarity = cosine_similarity(patches.double(), cls.double()[None], dim=1).cpu()
    order = similarity.argsort(descending=True, stable=True)
    return order[ranks(rows * cols)].sort().values


def auto(grid: tuple[int, int], has_cls: bool) -> tuple[Literal["ranks", "tiles", "all"], int]:
    """The kind of candidates for a model that none are published for, and how many tokens it probes in an image.

    Where ranks or tiles are fewer than `FEW`, all: three in a hundred of them would be no token in most images.
    """
    probed = len(ranks(grid[0] * grid[1]) if has_cls else centres(grid))
    if probed < FEW:
        return "all", grid[0] * grid[1]
    return "ranks" if has_cls else "tiles", probed


def centres(grid: tuple[int, int]) -> list[int]:
    """The centres of the 3x3 tiles of a grid, in raster order."""
    rows, cols = grid
    return [row * cols + col for row in range(1, rows - 1, 3) for col in range(1, cols - 1, 3)]


def ranks(n: int) -> list[int]:
    """The 0-based ranks probed of `n` tokens: the published bands of 576, stretched, at least one rank of each."""
    chosen = set()
    for start, width in BANDS:
        first = min(round(start * n / BANDS_OF), n - 1)
        chosen |= set(range(first, max(first + 1, round((start + width) * n / BANDS_OF))))
    return sorted(chosen)
