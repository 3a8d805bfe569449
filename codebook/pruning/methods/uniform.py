"""Uniform pruning: an even grid, the baseline that needs neither model nor image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from codebook.pruning.methods.base import Pruner
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class Uniform(Pruner):
    """Keep exactly `keep` tokens spread evenly over the image (phi_uniform of arXiv 2412.13180, at any count).

    The image is cut into the fewest near-square cells that suffice and the token at each cell's centre is kept; cells
    in excess are left out at even distances. Where earlier stages have left gaps, every (n / keep)-th survivor in
    raster order is kept instead.
    """

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        n, device = len(tokens), tokens.ordinal.device
        rows, cols = tokens.grid
        if n < rows * cols:
            return evenly_spaced(n, keep, device)
        down = min(rows, max(1, round(math.sqrt(keep * rows / cols))))
        across = math.ceil(keep / down)
        if across > cols:
            down, across = math.ceil(keep / cols), cols
        cells = evenly_spaced(rows, down, device)[:, None] * cols + evenly_spaced(cols, across, device)
        return cells.flatten()[evenly_spaced(down * across, keep, device)]


def evenly_spaced(n: int, keep: int, device: torch.device) -> Tensor:
    """(keep,) distinct ascending indices at the centres of `keep` equal parts of range(n)."""
    return (2 * torch.arange(keep, device=device) + 1) * n // (2 * keep)
