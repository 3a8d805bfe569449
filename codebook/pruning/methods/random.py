"""Random pruning: the baseline, and what is left to do beyond the information horizon (arXiv 2512.07580)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from codebook.pruning.methods.base import ScoringPruner, option
from codebook.pruning.tokens import VisualTokens, mix, places


@dataclass(frozen=True)
class Random(ScoringPruner):
    """Keep tokens uniformly at random, without replacement.

    The choice depends on the seed, the image's pixels and place in the prompt, and each token's place in the image: on
    nothing else, so a sample keeps the same tokens alone, in any batch and on any device.
    """

    seed: int = option(0, -(2**63), 2**63 - 1)

    def score(self, tokens: VisualTokens) -> Tensor:
        mixed = places(tokens.grid[0] * tokens.grid[1], tokens.ordinal.device)  # once for all images of a size
        return mix(mix(tokens.key + self.seed) ^ mixed[tokens.ordinal])
