"""Density peaks of the vision features (phi_KNN of FEATHER, arXiv 2412.13180)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codebook.pruning.methods.base import ScoringPruner, gram, option
from codebook.pruning.tokens import VisualTokens

LARGEST_TIE_BREAK = 1e-6
"""Largest number added to a density, so that no two are equal."""

CACHED = 2**18
"""Distances that are worked on at once on a CPU, so that its cache holds them: 2 MiB."""


@dataclass(frozen=True)
class DensityPeaks(ScoringPruner):
    """Keep the tokens whose projector outputs lie densely and far from any denser one.

    The score is the density, exp of minus the mean squared distance to the nearest neighbours, times the distance to
    the nearest denser token; the densest has none, and gets the largest distance of all. Distances are euclidean,
    divided by sqrt(d). Of equal tokens the later in raster order counts as the denser.

    Attributes
    ----------
    neighbours
        In a density, the token itself counted.
    """

    neighbours: int = option(5, 1)

    def score(self, tokens: VisualTokens) -> Tensor:
        tie = tokens.ordinal / (tokens.grid[0] * tokens.grid[1])
        return peakedness(tokens.features, self.neighbours, tie)


@torch.no_grad()
def peakedness(x: Tensor, neighbours: int, tie: Tensor) -> Tensor:
    """Density times distance to the nearest denser point, of points (n, d), as `DensityPeaks` says: (n,) float64.

    `tie` (n,), in [0, 1], orders equal densities.
    """
    # In float64: near-equal points would get distances from rounding, and densities near 1 would leave float32 no room
    # for the tie-break. All distances are squared and not divided until the end.
    n = len(x)
    square = gram(x.double())
    length = square.diagonal().clone()
    rows = max(1, CACHED // n) if x.device.type == "cpu" else n
    near, most = [], []
    for part, own in zip(square.split(rows), length.split(rows), strict=True):
        torch.add(own[:, None] + length, part, alpha=-2, out=part).clamp_(min=0)
        near.append(part.topk(min(neighbours, n), dim=1, largest=False).values.mean(1))
        most.append(part.amax())
    density = (-torch.cat(near) / x.shape[1]).exp() + LARGEST_TIE_BREAK * tie
    pairs = zip(square.split(rows), density.split(rows), strict=True)
    gap = torch.cat([part.where(density > own[:, None], torch.inf).amin(1) for part, own in pairs])
    return density * torch.minimum(gap, torch.stack(most).amax()).div(x.shape[1]).sqrt()
