"""SCoRe: the weighted k-center problem, greedily (CVPR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from codebook.pruning.methods.base import Pruner, gram, option
from codebook.pruning.methods.cls import Cls
from codebook.pruning.methods.farthest import beginning_at, farthest_points
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class SCoRe(Pruner):
    """Again and again the token with the largest distance from the kept ones times salience to the power alpha.

    The most salient token is first. The salience is [CLS] attention (`Cls`), the distance the cosine distance of
    projector outputs; the authors prune inside the vision tower. The formula is from second-hand notes, which do not
    say alpha.

    Attributes
    ----------
    alpha
        Power of the salience.
    """

    alpha: float = option(1.0, 0, 4)
    uses_vision: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        salience = Cls().score(tokens)
        similarity = gram(normalize(tokens.features.float(), dim=-1))
        nearest = beginning_at(salience.argmax(keepdim=True), similarity)
        return farthest_points(similarity[None], nearest[None], keep, gate=salience[None] ** self.alpha)[0]
