"""Density peaks of the vision features (phi_KNN of FEATHER, arXiv 2412.13180)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from codebook.density import density_peaks
from codebook.pruning.methods.base import ScoringPruner
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class DensityPeaks(ScoringPruner):
    """Keep the tokens whose projector outputs lie densely and far from any denser one.

    The score is the density, exp of minus the mean squared distance to the nearest neighbours, times the distance to
    the nearest denser token. Of equal tokens the later in raster order counts as the denser.

    Attributes
    ----------
    neighbours
        In a density, the token itself counted.
    """

    neighbours: int = 5

    def score(self, tokens: VisualTokens) -> Tensor:
        tie = tokens.ordinal.double() / (tokens.grid[0] * tokens.grid[1])
        density, gap = density_peaks(tokens.features.double(), self.neighbours, tie)
        return density * gap
