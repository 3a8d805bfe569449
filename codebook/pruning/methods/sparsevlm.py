"""SparseVLM: text raters score the visual tokens; some of the dropped are recycled (arXiv 2410.04417)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.pruning.methods.base import ScoringPruner, group_means, option
from codebook.pruning.methods.phi_knn import peakedness
from codebook.pruning.tokens import VisualTokens, needed


@dataclass(frozen=True)
class SparseVLM(ScoringPruner):
    """Keep what the text raters attend to most, and the averages of clusters of the best of what is dropped.

    Raters are the question's tokens whose mean cosine similarity to the visual tokens, in hidden states, is at least
    the mean over the question; the score is their attention in the layer before, over heads. (The authors compare word
    embeddings with projector outputs, through a softmax.)

    Recycling: of the R tokens that stay of n, c = 1 + floor(recycled * clusters * (n - R)), but at most half of R, are
    averages. The dropped tokens with the highest scores, a share `recycled` of them, are clustered by density peaks,
    and each of the c peaks takes the average hidden state of those that are nearest to it.

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
        text = normalize(tokens.sequence[tokens.question].float(), dim=-1)
        similarity = text @ normalize(tokens.hidden.float(), dim=-1).mean(0)
        return (similarity >= similarity.mean()).float() @ attention.rows(tokens.question)

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        top, dropped = self._parts(tokens, keep)
        if not len(dropped):
            return top.sort().values
        return torch.cat([top, dropped[self._peaks(tokens.hidden[dropped], keep - len(top))]]).sort().values

    def merge(self, tokens: VisualTokens, index: Tensor) -> Tensor | None:
        keep = len(index)
        top, dropped = self._parts(tokens, keep)
        if not len(dropped):
            return None
        hidden = tokens.hidden[dropped].float()
        peaks = self._peaks(hidden, keep - len(top))
        group = torch.full_like(tokens.ordinal, keep)  # what is not recycled is in no group
        group[dropped] = torch.searchsorted(index, dropped[peaks])[torch.cdist(hidden, hidden[peaks]).argmin(1)]
        group[index] = torch.arange(keep, device=index.device)
        return group_means(tokens.hidden, group, keep)

    def _parts(self, tokens: VisualTokens, keep: int) -> tuple[Tensor, Tensor]:
        """The tokens that stay by their score, and those that are recycled, both best first."""
        n = len(tokens)
        order = self.score(tokens).argsort(descending=True, stable=True)
        if not self.recycled or keep == 1:
            return order[:keep], order[:0]
        averages = min(keep // 2, 1 + int(self.recycled * self.clusters * (n - keep)))
        own = keep - averages
        return order[:own], order[own : own + max(averages, round(self.recycled * (n - own)))]

    @staticmethod
    def _peaks(hidden: Tensor, count: int) -> Tensor:
        tie = torch.arange(len(hidden), 0, -1, device=hidden.device).double() / len(hidden)
        return peakedness(hidden, 5, tie).topk(count).indices.sort().values
