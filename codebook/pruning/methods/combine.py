"""Methods made of other methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codebook.pruning.methods.base import Pruner, ScoringPruner
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class Union(Pruner):
    """What one pruner keeps, filled up by the ranking of another (the ensembles of FEATHER, arXiv 2412.13180).

    The paper lets the union of two fixed selections have whatever size it has; here the size is given, and `share` of
    it, rounded, is `first`'s.

    Attributes
    ----------
    first
        Chooses its share freely.
    second
        Ranks the other tokens for the rest.
    share
        In [0, 1].
    """

    first: Pruner
    second: ScoringPruner
    share: float = 1 / 3

    @property
    def uses_attention(self) -> bool:  # type: ignore[override]
        return self.first.uses_attention or self.second.uses_attention

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        score = self.second.score(tokens).float()
        if own := round(self.share * keep):
            score[self.first.select(tokens, own)] = torch.inf
        return score.topk(keep).indices.sort().values


@dataclass(frozen=True)
class Window(Pruner):
    """A ranking applied inside each window of the grid, as in Window FastV (arXiv 2502.11501).

    Every window keeps the same number of tokens, or one more where the budget does not divide: then the windows whose
    next token ranks highest. Needs all of the image's tokens.

    Attributes
    ----------
    ranking
        Scores the tokens.
    windows
        Rows and columns of windows; the grid is cut as evenly as it goes.
    """

    ranking: ScoringPruner
    windows: tuple[int, int] = (4, 4)

    @property
    def uses_attention(self) -> bool:  # type: ignore[override]
        return self.ranking.uses_attention

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        rows, cols = tokens.grid
        down, across = self.windows
        row, col = tokens.ordinal // cols, tokens.ordinal % cols
        window = (row * down // rows) * across + col * across // cols
        score = self.ranking.score(tokens)
        # A token's rank within its window comes first, its score second.
        order = score.argsort(descending=True)
        same = window[order][:, None] == window[order]
        rank = torch.empty_like(window)
        rank[order] = same.tril(-1).sum(1)
        best = torch.empty_like(window)
        best[order] = torch.arange(len(order), device=order.device)
        return (rank * len(order) + best).topk(keep, largest=False).indices.sort().values
