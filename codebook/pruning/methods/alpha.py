"""Importance against duplication (arXiv 2502.11501)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity

from codebook.pruning.methods.base import ScoringPruner, option, unit_range
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
        uniqueness = -cosine_similarity(tokens.hidden.float(), tokens.last.float()[None], dim=-1)
        return self.alpha * unit_range(importance) + (1 - self.alpha) * unit_range(uniqueness)
