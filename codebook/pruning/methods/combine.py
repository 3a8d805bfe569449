"""Methods made of other methods."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from numbers import Real

import torch
from torch import Tensor

from codebook.errors import CodebookError, quoted
from codebook.pruning.methods.base import FeaturePruner, Pruner, ScoringPruner, option, unit_range
from codebook.pruning.tokens import VisualTokens


class Combination(Pruner):
    """A pruner that needs what the pruners it is made of need.

    These choose or rank in one image and do no more: none compares frames, and none merges, unless only its ranking is
    asked for.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        for part in self.parts:
            if not isinstance(part, Pruner):
                raise CodebookError(f"{name} is made of pruners, objects such as Random(), not of {quoted(part)}")
            merges = type(part).merge is not Pruner.merge and not isinstance(part, ScoringPruner)
            if part.joint or merges:
                does = "compares frames" if part.joint else "merges tokens"
                raise CodebookError(f"{type(part).__name__} {does}: use it alone, in no {name}")
        for part in self.rankers:
            if not isinstance(part, ScoringPruner):
                raise CodebookError(f"{type(part).__name__} ranks no tokens, and {name} asks for a ranking: use a "
                                    "ScoringPruner, such as Random()")  # fmt: skip

    @property
    @abstractmethod
    def parts(self) -> Sequence[Pruner]:
        """The pruners that it is made of."""

    @property
    def rankers(self) -> Sequence[Pruner]:
        """Those whose scores it asks for."""
        return ()

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

    @property
    def uses_change(self) -> bool:  # type: ignore[override]
        return any(part.uses_change for part in self.parts)


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
        super().__post_init__()
        if len(self.pruners) != len(self.weights) or not self.pruners:
            raise CodebookError(f"{len(self.weights)} weights for {len(self.pruners)} pruners: give one for each")
        if not all(isinstance(weight, Real) and math.isfinite(weight) for weight in self.weights):
            raise CodebookError(f"the weights of Weighted are {quoted(self.weights)}: give numbers, each finite")

    @property
    def parts(self) -> Sequence[Pruner]:
        return self.pruners

    @property
    def rankers(self) -> Sequence[Pruner]:
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

    @property
    def rankers(self) -> Sequence[Pruner]:
        return (self.second,)

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        score = self.second.score(tokens).float()
        if own := round(self.share * keep):
            score = score.index_fill(0, self.first.select(tokens, own), torch.inf)
        return score.topk(keep).indices.sort().values


@dataclass(frozen=True)
class Window(Combination):
    """A pruner applied inside each window of the grid, as in Window FastV (arXiv 2502.11501) and Nuwa (2602.02951).

    By a ranking every window keeps the same number of tokens, or one more where the budget does not divide: then the
    windows whose next token ranks highest. Any other pruner chooses in each window as if it were an image, and a
    window keeps in proportion to its tokens; where fewer stay than there are windows, these are made larger. Where
    earlier stages have left gaps, its windows are cut so that each has as many of the tokens that are left.

    Attributes
    ----------
    pruner
        Scores the tokens, or chooses them; none that merges.
    windows
        Rows and columns of windows; the grid is cut as evenly as it goes.
    """

    pruner: Pruner
    windows: tuple[int, int] = option((4, 4), 1, 2**15)

    @property
    def parts(self) -> Sequence[Pruner]:
        return (self.pruner,)

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        if isinstance(self.pruner, ScoringPruner):
            return self._ranked(tokens, self.pruner.score(tokens), keep)
        cells = list(self._cells(tokens, keep))
        ends = list(accumulate(map(len, cells), initial=0))
        kept = [(2 * end * keep + len(tokens)) // (2 * len(tokens)) for end in ends]  # so many up to there, rounded
        counts = [after - before for before, after in pairwise(kept)]
        return torch.cat(list(self._chosen(tokens, cells, counts))).sort().values

    def _ranked(self, tokens: VisualTokens, score: Tensor, keep: int) -> Tensor:
        rows, cols = tokens.grid
        down, across = self.windows
        row, col = tokens.ordinal // cols, tokens.ordinal % cols
        window = (row * down // rows) * across + col * across // cols
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

    def _cells(self, tokens: VisualTokens, keep: int) -> Iterator[Tensor]:
        """For each window the places of its tokens, ascending; how many these are does not depend on what they hold."""
        n, (rows, cols) = len(tokens), tokens.grid
        down, across = min(self.windows[0], rows), min(self.windows[1], cols)
        while down * across > keep:
            down, across = (down - 1, across) if down >= across else (down, across - 1)
        whole = n == rows * cols
        col = tokens.ordinal % cols
        for top, bottom in pairwise(_even_edges(rows, down, cols) if whole else _even_edges(n, down)):
            band = top + col[top:bottom].argsort(stable=True)
            columns = _even_edges(cols, across, (bottom - top) // cols) if whole else _even_edges(len(band), across)
            for left, right in pairwise(columns):
                yield band[left:right].sort().values

    def _chosen(self, tokens: VisualTokens, cells: list[Tensor], counts: list[int]) -> Iterator[Tensor]:
        """For each window the places of the tokens that stay of it."""
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for cell, count in zip(cells, counts, strict=True):
            if count:
                alike.setdefault((len(cell), count), []).append(cell)
        for (_, count), some in alike.items():
            if isinstance(self.pruner, FeaturePruner):
                places = torch.stack(some)
                yield places.gather(1, self.pruner.select_each(tokens.features[places], count)).flatten()
            else:
                yield from (cell[self.pruner.select(_part(tokens, cell), count)] for cell in some)


def _even_edges(length: int, parts: int, unit: int = 1) -> list[int]:
    """Where `parts` equal parts of a length begin and end, in whole numbers, times a unit: parts + 1 numbers."""
    return [-(-i * length // parts) * unit for i in range(parts + 1)]


def _part(tokens: VisualTokens, places: Tensor) -> VisualTokens:
    """Some of an image's tokens, (m,) int64."""
    span = torch.arange(len(tokens.sequence), device=places.device)[tokens.span][places]
    attention = None if tokens.attention is None else replace(tokens.attention, span=tokens.attention.places[places])
    return replace(
        tokens,
        features=tokens.features[places],
        hidden=tokens.hidden[places],
        span=span,
        ordinal=tokens.ordinal[places],
        attention=attention,
        known={},
    )
