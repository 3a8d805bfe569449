"""SparseVLM: text raters score the visual tokens; some of the dropped are recycled (arXiv 2410.04417)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from codebook.pruning.methods.base import ScoringPruner, group_means, option
from codebook.pruning.methods.phi_knn import peakedness
from codebook.pruning.tokens import VisualTokens, needed


@dataclass(frozen=True)
class SparseVLM(ScoringPruner):
    """Keep what the text raters attend to most, and the averages of clusters of the best of what is dropped.

    Raters are the tokens of the text after the image of which the visual tokens are reminded most: every visual token
    shares itself out among them by a softmax over the products of what enters the LLM for it and for them, and the
    raters get at least the average share. The score is their attention in the layer before, over heads.

    Recycling: m = 1 + floor(recycled * dropped) of the dropped tokens, those with the highest scores, are clustered by
    density peaks, with as many neighbours as there are clusters, and c = 1 + floor(clusters * m) averages of hidden
    states take the places of the peaks. The authors give the number of tokens that stay by their score, and the
    averages come on top. Here exactly R stay in all, so that R - c stay by their score, one at least. (A number below
    the least that the rule can give leaves one, and R - 1 averages.)

    Attributes
    ----------
    recycled
        Share of the dropped tokens that is clustered; 0 keeps the top R alone.
    clusters
        Clusters for each token that is clustered.
    """

    recycled: float = option(0.3, 0, 1)
    clusters: float = option(0.1, 0, 1)
    uses_attention: ClassVar[bool] = True
    uses_text: ClassVar[bool] = True

    def score(self, tokens: VisualTokens) -> Tensor:
        attention = needed(tokens.attention, "the attention of the layer before")
        words = needed(tokens.words, "the question's text").float()
        share = (needed(tokens.whole, "the image's tokens").float() @ words.T).softmax(1).mean(0)
        return (share >= share.mean()).float() @ attention.rows(tokens.question)

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        top, dropped, peaks = self._parts(tokens, keep)
        return torch.cat([top, dropped[peaks]]).sort().values

    def merge(self, tokens: VisualTokens, index: Tensor) -> Tensor | None:
        keep = len(index)
        _, dropped, peaks = self._parts(tokens, keep)
        if not len(dropped):
            return None
        hidden = tokens.hidden[dropped].float()
        group = torch.full_like(tokens.ordinal, keep)  # what is not recycled is in no group
        group[dropped] = torch.searchsorted(index, dropped[peaks])[torch.cdist(hidden, hidden[peaks]).argmin(1)]
        group[index] = torch.arange(keep, device=index.device)
        return group_means(tokens.hidden, group, keep)

    def _parts(self, tokens: VisualTokens, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that stay by their score, those that are recycled, both best first, and which of these are peaks.

        Worked out once: scores cost attention maps, and in another forward they may have another order by rounding.
        """
        return tokens.once((self, keep), lambda: self._divided(tokens, keep))

    def _divided(self, tokens: VisualTokens, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        order = self.score(tokens).argsort(descending=True, stable=True)
        if not self.recycled or keep == 1:
            return order[:keep], order[:0], order[:0]
        own = next((own for own in range(keep - 1, 1, -1) if own + self._averages(len(tokens) - own)[1] <= keep), 1)
        recycled = max(keep - own, self._averages(len(tokens) - own)[0])
        dropped = order[own : own + recycled]
        return order[:own], dropped, self._peaks(tokens.hidden[dropped], keep - own)

    def _averages(self, dropped: int) -> tuple[int, int]:
        """Numbers of those that are recycled of so many dropped tokens, and of the averages that come of them."""
        recycled = 1 + int(self.recycled * dropped)
        return recycled, 1 + int(self.clusters * recycled)

    @staticmethod
    def _peaks(hidden: Tensor, count: int) -> Tensor:
        tie = torch.arange(len(hidden), 0, -1, device=hidden.device).double() / len(hidden)
        return peakedness(hidden, count, tie).topk(count).indices.sort().values
