"""A pruner only chooses: slicing, masks, positions, caches and quotas are the library's (`codebook.pruning.hooks`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from codebook.pruning.tokens import VisualTokens


class Pruner(ABC):
    """Chooses which of one image's visual tokens stay."""

    uses_attention: ClassVar[bool] = False
    """Whether it needs `tokens.attention`; such a pruner works at layer 1 or later."""

    @abstractmethod
    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        """Indices of the tokens that stay.

        Parameters
        ----------
        tokens
            The `n` tokens of one image.
        keep
            How many stay, 1 <= keep <= n.

        Returns
        -------
        (keep,) int64, ascending, without repeats, on the tokens' device
        """


class ScoringPruner(Pruner):
    """Keeps the tokens with the highest scores."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """(n,) scores: the higher, the rather kept."""

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        return self.score(tokens).topk(keep).indices.sort().values
