"""DivPrune: keep the most diverse tokens (arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.pruning.methods.base import Pruner
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class DivPrune(Pruner):
    """Max-min diversity by cosine distance of projector outputs, greedily (algorithm 1).

    First the token furthest from its nearest other one, then again and again the one furthest from all chosen. The
    distance to the chosen set is a running minimum, so the cost is keep * n, without a host sync.
    """

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        unit = normalize(tokens.features.float(), dim=-1)
        similarity = unit @ unit.T
        nearest = similarity.clone().fill_diagonal_(-torch.inf).amax(1)
        chosen = torch.empty(keep, dtype=torch.long, device=unit.device)
        for i in range(keep):
            # One place, not a number: indexing with a number on the device waits for it.
            chosen[i : i + 1] = pick = nearest.argmin(keepdim=True)
            # From the first pick on, what counts is the similarity to the chosen ones; those, at infinity, stay there.
            row = similarity[pick][0]
            nearest = (row if i == 0 else torch.maximum(nearest, row)).index_fill(0, pick, torch.inf)
        return chosen.sort().values
