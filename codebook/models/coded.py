"""Pictures of coloured cells, by which one tells which cell a visual token stands for.

The picture of a grid of cells is shown in several variants. In each of them every cell has one of two colours, by a
code of its own. A token that stands for a cell changes with its code.
"""

from __future__ import annotations

import math

import torch
from PIL import Image as Picture
from torch import Tensor

STILL = 1e-6
"""A token whose change is below this share of the median changes with no picture."""


def coded_pictures(grid: tuple[int, int], size: tuple[int, int], seed: int) -> tuple[list[Picture.Image], Tensor]:
    """Variants of a picture of this height and width, and the code of each cell of its grid: (cells, variants) bool."""
    cells = grid[0] * grid[1]
    codes, colours = cell_codes(cells, seed), _cell_colours(cells, seed)
    return [drawn(torch.where(on[:, None], 255 - colours, colours), grid, size) for on in codes.T], codes


def plain_picture(size: tuple[int, int]) -> Picture.Image:
    """A picture of this height and width, of four colours."""
    return drawn(_cell_colours(4, 0), (2, 2), size)


def cell_codes(cells: int, seed: int) -> Tensor:
    """(cells, variants) bool: in which variants each cell shows its second colour."""
    variants = 2 * math.ceil(math.log2(max(cells, 2))) + 8
    return torch.rand(cells, variants, generator=torch.Generator().manual_seed(seed)) < 0.5


def _cell_colours(cells: int, seed: int) -> Tensor:
    """(cells, 3) uint8, far from middle grey, so that each colour differs from its complement."""
    values = torch.randint(0, 120, (cells, 3), generator=torch.Generator().manual_seed(seed))
    return torch.where(values < 60, values, values + 136).to(torch.uint8)


def drawn(colours: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Picture.Image:
    """The picture of this height and width whose cells have these colours (cells, 3) uint8."""
    rows = torch.arange(size[0]) * grid[0] // size[0]
    cols = torch.arange(size[1]) * grid[1] // size[1]
    return Picture.fromarray(colours.view(*grid, 3)[rows][:, cols].contiguous().numpy())


def still_tokens(tokens: Tensor) -> Tensor:
    """(T,) bool: which tokens are the same in all variants (K, T, d) float."""
    change = (tokens - tokens.mean(0)).square().sum((0, 2))
    return change <= STILL * change.median()


def cell_scores(tokens: Tensor, codes: Tensor) -> Tensor:
    """The share of each token's change that follows each cell's code.

    Parameters
    ----------
    tokens : (K, T, d) float
        K variants of T tokens.
    codes : (C, K) bool

    Returns
    -------
    (T, C), from squared lengths: of the change that the code explains by itself, and of the whole
    """
    change = tokens - tokens.mean(0)
    products = torch.einsum("ktd,ltd->tkl", change, change).flatten(1)
    signs = codes.float() - codes.float().mean(1, keepdim=True)
    patterns = (signs[:, :, None] * signs[:, None]).flatten(1)
    scale = signs.square().sum(1) * change.square().sum((0, 2))[:, None]
    return products @ patterns.T / scale.clamp(min=1e-30)
