"""S2Prune: tokens where the picture has structure, in each cell the one that the first layer changes most.

The rule is that of the authors' repository, https://github.com/yuanyuanjia71-spec/S2Prune.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, product
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from codebook.errors import CodebookError
from codebook.pruning.methods.base import Pruner
from codebook.pruning.methods.vidcom2 import divided
from codebook.pruning.tokens import VisualTokens, on_device

GREY = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in a grey value (ITU-R BT.601)."""

LEAST = 1e-9
"""What is added to the shares of the regions, which are up to 1, so that a flat picture is divided evenly."""

Rectangle = tuple[int, int, int, int]
"""Rows and columns of the grid: top, bottom, left, right."""


@dataclass(frozen=True)
class S2Prune(Pruner):
    """Divide the tokens among regions by the variance of the picture's Laplacian, and cut each into so many cells.

    The grid is cut into m x m regions, with m the whole part of sqrt(keep / 2), as in the authors' table. Each gets one
    token; the rest is divided in proportion to the variance, scaled to [0, 1] in the image, and what a region has no
    room for among the others. It is then cut into as many cells, again and again the largest one across its longer
    side. Of each cell stays the token whose hidden state has moved furthest from what entered the LLM.

    The authors stand behind the first decoder layer, so the method stands at layer 1 unless told otherwise. Pixels are
    taken as the vision tower gets them, with its processor's scale for each colour.

    Raises
    ------
    CodebookError
        If an earlier stage has dropped tokens, or the model does not take the image as one picture that the tokens'
        square patches cover.

    Notes
    -----
    The host waits for the variances, once per image.
    """

    uses_change: ClassVar[bool] = True
    default_layer: ClassVar[int] = 1

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        rows, cols = tokens.grid
        if len(tokens) < rows * cols:
            raise CodebookError("s2prune needs the whole image: make it the first stage")
        parts = max(1, min(rows, cols, math.isqrt(keep // 2)))
        regions = [
            (*down, *across) for down, across in product(pairwise(edges(rows, parts)), pairwise(edges(cols, parts)))
        ]
        shares = structure(picture_of(tokens), regions, tokens.grid)
        most = [(bottom - top) * (right - left) - 1 for top, bottom, left, right in regions]
        more = divided(keep - len(regions), [share + LEAST for share in shares], most)
        cells = [cell for region, count in zip(regions, more, strict=True) for cell in cut(region, 1 + count)]
        number = torch.empty(rows, cols, dtype=torch.int64)
        for i, (top, bottom, left, right) in enumerate(cells):
            number[top:bottom, left:right] = i
        moved = (tokens.hidden.float() - tokens.features.float()).norm(dim=-1)
        order = moved.argsort(descending=True, stable=True)
        own = on_device(number.flatten(), order.device)[order]
        by_cell = own.argsort(stable=True)  # cell by cell, the token that moved furthest first
        first = torch.searchsorted(own[by_cell], torch.arange(keep, device=order.device))
        return order[by_cell[first]].sort().values


def picture_of(tokens: VisualTokens) -> Tensor:
    """(H, W) float32: the image in grey."""
    (rows, cols), pixels = tokens.grid, tokens.pixels
    if pixels is None or pixels.shape[1] * cols != pixels.shape[2] * rows or pixels.shape[1] % rows:
        raise CodebookError(
            "s2prune needs the image as one picture that the tokens' square patches cover, and this model takes it in "
            "another form: load the processor with one view per image, or use nuwa"
        )
    return (pixels.float() * pixels.new_tensor(GREY, dtype=torch.float32)[:, None, None]).sum(0)


def edges(side: int, parts: int) -> list[int]:
    """Where `parts` parts of a side begin and end, rounded to whole numbers: parts + 1 numbers."""
    return [round(i * side / parts) for i in range(parts + 1)]


def structure(grey: Tensor, regions: list[Rectangle], grid: tuple[int, int]) -> list[float]:
    """Variance of a picture's Laplacian (H, W) in each region of the grid, scaled to [0, 1] over the regions."""
    wide = pad(grey[None], (1, 1, 1, 1), mode="replicate")[0]
    laplacian = wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:] - 4 * grey
    high, across = grey.shape[0] // grid[0], grey.shape[1] // grid[1]
    cells = [
        laplacian[top * high : bottom * high, left * across : right * across] for top, bottom, left, right in regions
    ]
    found = torch.stack([cell.var(correction=0) for cell in cells]).tolist()
    if not all(map(math.isfinite, found)):
        raise CodebookError("an image's pixels are not numbers (NaN), so its structure cannot be measured: check them")
    spread = max(found) - min(found)
    return [(value - min(found)) / spread if spread else 0.0 for value in found]


def cut(cell: Rectangle, count: int) -> list[Rectangle]:
    """A cell cut into so many: again and again the largest, or the first such, in the middle of its longer side."""
    cells = [cell]
    while len(cells) < count:
        areas = [(bottom - top) * (right - left) for top, bottom, left, right in cells]
        i = areas.index(max(areas))
        top, bottom, left, right = cells[i]
        if bottom - top >= right - left:
            middle = (top + bottom) // 2
            cells[i : i + 1] = [(top, middle, left, right), (middle, bottom, left, right)]
        else:
            middle = (left + right) // 2
            cells[i : i + 1] = [(top, bottom, left, middle), (top, bottom, middle, right)]
    return cells
