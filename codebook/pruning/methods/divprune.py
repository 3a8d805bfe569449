"""DivPrune: keep the most diverse tokens (arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codebook.pruning.methods.base import option
from codebook.pruning.methods.farthest import Farthest, beginning_at, furthest


@dataclass(frozen=True)
class DivPrune(Farthest):
    """Max-min diversity by cosine distance of projector outputs, greedily (algorithm 1).

    First the token furthest from its nearest other one, then again and again the one furthest from all chosen. The
    distance to the chosen set is a running minimum, so the cost is keep * n, without a host sync.

    Attributes
    ----------
    centred, middle
        As in `Farthest`.
    """

    centred: bool = option(False)
    middle: bool = option(False)

    def begin(self, features: Tensor, similarity: Tensor, gate: Tensor | None) -> Tensor:
        itself = similarity.diagonal()
        own = itself.clone()
        itself.fill_(-torch.inf)
        first = furthest(similarity.amax(1)[None], None if gate is None else gate[None])
        itself.copy_(own)
        return beginning_at(first, similarity)
