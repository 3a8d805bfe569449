"""Density peaks of the vision features (phi_KNN of FEATHER, arXiv 2412.13180)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codebook.pruning.methods.base import ScoringPruner, option
from codebook.pruning.tokens import VisualTokens

LARGEST_TIE_BREAK = 1e-6
"""Largest number added to a density, so that no two are equal."""


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


def peakedness(x: Tensor, neighbours: int, tie: Tensor) -> Tensor:
    """Density times distance to the nearest denser point, of points (n, d), as `DensityPeaks` says: (n,) float64.

    `tie` (n,), in [0, 1], orders equal densities.
    """
    # In float64: densities near 1 would leave float32 no room for the tie-break.
    distance = (torch.cdist(x.double(), x.double()) / x.shape[1] ** 0.5).fill_diagonal_(0)
    near = distance.topk(min(neighbours, len(x)), dim=1, largest=False).values
    density = (-near.square().mean(dim=1)).exp() + LARGEST_TIE_BREAK * tie
    return density * distance.where(density[None] > density[:, None], distance.max()).amin(dim=1)
