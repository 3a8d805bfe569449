"""Uniform pruning: an even grid, the baseline that needs neither model nor image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from codebook.pruning.methods.base import Pruner, option
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class Uniform(Pruner):
    """Keep exactly `keep` tokens spread evenly over the image.

    The image is cut into the fewest near-square cells that suffice and one token of each cell is kept; cells in excess
    are left out at even distances. Where earlier stages have left gaps, every (n / keep)-th survivor in raster order is
    kept instead.

    Attributes
    ----------
    phase
        Which token of a cell: its `centre`, or its upper left `corner`, as in phi_uniform of arXiv 2412.13180. The
        rows and columns of the latter are 0, s, 2s, ... wherever a whole stride s gives as many.
    """

    phase: Literal["centre", "corner"] = option("centre", choices=("centre", "corner"))

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        return even_grid(len(tokens), tokens.grid, keep, self.phase, tokens.ordinal.device)


@lru_cache(maxsize=64)  # the same for every image of one size
def even_grid(n: int, grid: tuple[int, int], keep: int, phase: str, device: torch.device) -> Tensor:
    """What `Uniform` keeps of the `n` tokens that are left of a grid: (keep,) int64, not to be changed."""
    rows, cols = grid
    with torch.inference_mode(False):  # it outlives the caller's mode
        if n < rows * cols:
            return evenly_spaced(n, keep, device)
        down = min(rows, max(1, round(math.sqrt(keep * rows / cols))))
        across = math.ceil(keep / down)
        if across > cols:
            down, across = math.ceil(keep / cols), cols
        spaced = evenly_spaced if phase == "centre" else strided
        cells = spaced(rows, down, device)[:, None] * cols + spaced(cols, across, device)
        return cells.flatten()[evenly_spaced(down * across, keep, device)]


def evenly_spaced(n: int, keep: int, device: torch.device) -> Tensor:
    """(keep,) distinct ascending indices at the centres of `keep` equal parts of range(n)."""
    return (2 * torch.arange(keep, device=device) + 1) * n // (2 * keep)


def strided(n: int, keep: int, device: torch.device) -> Tensor:
    """(keep,) distinct ascending indices from 0 on: every s-th of range(n) where these are `keep`, else nearly so."""
    stride, places = math.ceil(n / keep), torch.arange(keep, device=device)
    return places * stride if (keep - 1) * stride < n else places * n // keep
