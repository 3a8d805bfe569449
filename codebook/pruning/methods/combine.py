"""Methods made of other methods."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codebook.errors import CodebookError
from codebook.pruning.methods.base import Pruner, ScoringPruner, option, unit_range
from codebook.pruning.tokens import VisualTokens


class Combination(Pruner):
    """A pruner that needs what the pruners it is made of need."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[Pruner]:
        """The pruners that it is made of."""

    @property
    def uses_attention(self) -> bool:  # type: ignore[override]
        return any(part.uses_attention for part in self.parts)

    @property
    def own_layer(self) -> bool:
        asked = {part.own_layer for part in self.parts if part.uses_attention}
        if len(asked) > 1:
            raise CodebookError("a stage asks one layer how it attends: give all parts that ask the same own_layer")
        return True in asked

    @property
    def uses_vision(self) -> bool:  # type: ignore[override]
        return any(part.uses_vision for part in self.parts)

    @property
    def uses_text(self) -> bool:  # type: ignore[override]
        return any(part.uses_text for part in self.parts)


@dataclass(frozen=True)
class Weighted(Combination, ScoringPruner):
    """A weighted sum of scores, each scaled to [0, 1] within the image.

    Attributes
    ----------
    pruners
        Pruners whose scores are added.
    weights
        One weight per pruner.
    """

    pruners: Sequence[ScoringPruner]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.pruners) != len(self.weights) or not self.pruners:
            raise CodebookError(f"{len(self.weights)} weights for {len(self.pruners)} pruners: give one for each")

    @property
    def parts(self) -> Sequence[Pruner]:
        return self.pruners

    def score(self, tokens: VisualTokens) -> Tensor:
        scores = [unit_range(pruner.score(tokens).float()) for pruner in self.pruners]
        return torch.stack([score * weight for score, weight in zip(scores, self.weights, strict=True)]).sum(0)


@dataclass(frozen=True)
class Union(Combination):
    """Tokens that one pruner keeps, filled up by the ranking of another (the ensembles of FEATHER, arXiv 2412.13180).

    The paper joins two fixed selections, a grid and the top of a ranking, to a set of whatever size; here the size is
    given, and `share` of it, rounded, is `first`'s. Where `first` is the paper's grid, `Uniform(phase="corner")`, that
    is the paper's set at its own size: the stride-3 grid and the top 182 of 27 x 27 tokens are 243 where they have 20
    in common, a third of them the grid. At another size it is that set less its lowest ranks, or with the next ones.

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
    share: float = option(1 / 3, 0, 1)

    @property
    def parts(self) -> Sequence[Pruner]:
        return self.first, self.second

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        score = self.second.score(tokens).float()
        if own := round(self.share * keep):
            score = score.index_fill(0, self.first.select(tokens, own), torch.inf)
        return score.topk(keep).indices.sort().values


@dataclass(frozen=True)
class Window(Combination):
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
    windows: tuple[int, int] = option((4, 4), 1, 2**15)

    @property
    def parts(self) -> Sequence[Pruner]:
        return (self.ranking,)

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        rows, cols = tokens.grid
        down, across = self.windows
        row, col = tokens.ordinal // cols, tokens.ordinal % cols
        window = (row * down // rows) * across + col * across // cols
        score = self.ranking.score(tokens)
        # A token's rank within its window comes first, its score second.
        order = score.argsort(descending=True)
        by_window = window[order].argsort(stable=True)  # of the ordered tokens: window by window, best first
        within = window[order][by_window]
        rank = torch.empty_like(window)
        place = torch.arange(len(order), device=order.device)
        rank[order[by_window]] = place - torch.searchsorted(within, within)  # less the place of its window's first
        best = torch.empty_like(window)
        best[order] = place
        return (rank * len(order) + best).topk(keep, largest=False).indices.sort().values
