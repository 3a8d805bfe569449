"""Average pooling, which beats many a ranking (arXiv 2502.11501)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from codebook.pruning.methods.base import Pruner, group_means
from codebook.pruning.methods.uniform import Uniform
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class Pool(Pruner):
    """Keep an even grid of any count (`Uniform`), each token the average of those nearest to it in the image.

    Before the LLM projector outputs are averaged, at a later layer hidden states. Where the count divides the grid into
    equal cells this is average pooling.
    """

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        return Uniform().select(tokens, keep)

    def merge(self, tokens: VisualTokens, index: Tensor) -> Tensor:
        cols = tokens.grid[1]
        row, col = tokens.ordinal // cols, tokens.ordinal % cols
        # Cells of even side have their centre between tokens, rounded up; a quarter more ends the tie beyond.
        down, across = ((x[:, None] + 0.25 - x[index]).abs() for x in (row, col))
        return group_means(tokens.hidden, (down**2 + across**2).argmin(1), len(index))
