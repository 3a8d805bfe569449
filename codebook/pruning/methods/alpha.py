"""Importance against duplication (arXiv 2502.11501)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from codebook.pruning.methods.base import LEAST_LENGTH, ScoringPruner, option, unit_range
from codebook.pruning.methods.fastv import FastV
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class Alpha(ScoringPruner):
    """The alpha criterion, `alpha * importance + (1 - alpha) * uniqueness`.

    Importance is FastV's score, uniqueness the negative cosine similarity to the last token's hidden state; both are
    scaled to [0, 1] within the image.
    """

    alpha: float = option(0.5, 0, 1)
    uses_attention: ClassVar[bool] = True
    uses_text: ClassVar[bool] = True

    def score(self, tokens: VisualTokens) -> Tensor:
        importance = FastV().score(tokens)
        hidden = tokens.hidden.float()
        # Not divided by the last token's length, which scaling to [0, 1] takes away again.
        uniqueness = -(hidden @ tokens.last.float()) / hidden.norm(dim=-1).clamp(min=LEAST_LENGTH)
        return self.alpha * unit_range(importance) + (1 - self.alpha) * unit_range(uniqueness)
