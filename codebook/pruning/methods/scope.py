"""SCOPE: saliency times what a token adds to the coverage of all (arXiv 2510.24214)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.pruning.methods.base import Pruner, gram, option
from codebook.pruning.methods.cls import Cls
from codebook.pruning.methods.coverpruner import greedy_cover
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class SCOPE(Pruner):
    """Again and again the token with the largest gain in coverage times saliency to the power alpha.

    The coverage is the sum, over all tokens, of the highest cosine similarity of projector outputs to a kept one, 0 at
    least. The saliency is [CLS] attention (`Cls`).

    Attributes
    ----------
    alpha
        Power of the saliency; 1 in the authors' script for LLaVA-1.5.
    """

    alpha: float = option(1.0, 0, 4)
    uses_vision: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        saliency = Cls().score(tokens)
        similarity = gram(normalize(tokens.features.float(), dim=-1))
        return greedy_cover(similarity, keep, torch.ones_like(saliency), saliency**self.alpha)
