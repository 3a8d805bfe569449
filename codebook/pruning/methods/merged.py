"""Merging: what stays becomes the mean of what it stands for, in the middle of it (RESTORE, arXiv 2606.01711)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codebook.pruning.methods.base import Pruner, group_means, middles, nearest_kept
from codebook.pruning.methods.combine import Combination
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class Merged(Combination):
    """Merge each dropped token into the kept one most like it, at the median position of the group.

    Most like is the highest cosine similarity of hidden states at the stage's layer. A group's value is the mean of its
    members, and it takes the place of the member in the middle of them in raster order (of an even number, the former
    of two). With the stage's `mass` it gets the attention of all of them; `mass="distance"` is all of RESTORE's
    calibration. Written from notes on the paper.

    Attributes
    ----------
    first
        Chooses the tokens that the others are merged into.
    """

    first: Pruner

    @property
    def parts(self) -> Sequence[Pruner]:
        return (self.first,)

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        return self._merged(tokens, keep)[0]

    def merge(self, tokens: VisualTokens, index: Tensor) -> Tensor:
        return group_means(tokens.hidden, self._merged(tokens, len(index))[1], len(index))

    def groups(self, tokens: VisualTokens, index: Tensor) -> Tensor:
        return self._merged(tokens, len(index))[1]

    def _merged(self, tokens: VisualTokens, keep: int) -> tuple[Tensor, Tensor]:
        """The middle members of the groups, (keep,) int64 ascending, and of which of these each token is, (n,).

        Worked out once: `first` may be slow, and asked again in another forward it may choose others by rounding.
        """
        return tokens.once((id(self), keep), lambda: self._grouped(tokens, keep))

    def _grouped(self, tokens: VisualTokens, keep: int) -> tuple[Tensor, Tensor]:
        group = nearest_kept(tokens.hidden, self.first.select(tokens, keep))
        middle = middles(group, keep)
        index = middle.sort().values
        return index, torch.searchsorted(index, middle)[group]
