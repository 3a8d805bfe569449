"""Redundancy codebook: drop the tokens most like those that never changed an answer (arXiv 2503.20540)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from codebook.pruning.methods.base import ScoringPruner
from codebook.pruning.tokens import VisualTokens

if TYPE_CHECKING:
    from codebook.index import Codebook


@dataclass(frozen=True)
class RedundancyCodebook(ScoringPruner):
    """Keep the tokens whose highest cosine similarity to any prototype is smallest (top-R, section 3.3)."""

    codebook: Codebook

    def score(self, tokens: VisualTokens) -> Tensor:
        return -self.codebook.redundancy(tokens.features)
