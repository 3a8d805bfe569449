"""Redundancy codebook: drop the tokens most like those that never changed an answer (arXiv 2503.20540)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from codebook.pruning.methods.base import FeaturePruner, ScoringPruner, option
from codebook.pruning.tokens import VisualTokens

if TYPE_CHECKING:
    from codebook.store.codebook import Codebook


@dataclass(frozen=True)
class RedundancyCodebook(FeaturePruner, ScoringPruner):
    """Keep the tokens that are least like any prototype (top-R, section 3.3).

    Attributes
    ----------
    codebook
        Prototypes of the model that is pruned.
    scoring
        How a token's likeness to the prototypes is measured. `max`: its highest cosine similarity to any prototype.
        `double_softmax`, the authors' for OneVision: the softmax of the similarities over the image's tokens times
        their softmax over the prototypes, and of these products the token's highest.
    """

    codebook: Codebook
    scoring: Literal["max", "double_softmax"] = option("max", choices=("max", "double_softmax"))

    def score(self, tokens: VisualTokens) -> Tensor:
        return self._score(tokens.features)

    def select_each(self, features: Tensor, keep: int) -> Tensor:
        # Image by image: a product with more rows may be rounded in another way (`Farthest`).
        scores = torch.stack([self._score(own) for own in features])
        return scores.topk(keep, dim=1).indices.sort(dim=1).values

    def _score(self, features: Tensor) -> Tensor:
        if self.scoring == "max":
            return -self.codebook.redundancy(features)
        similarity = self.codebook.similarity(features)
        return -(similarity.softmax(0) * similarity.softmax(1)).amax(1)


@dataclass(frozen=True)
class RedundancyThreshold(RedundancyCodebook):
    """Keep the tokens whose likeness to the prototypes is below a threshold: as many as the image has, at least one.

    Attributes
    ----------
    threshold
        Likeness from which on tokens are dropped, in the units of `scoring`: for `max` a cosine similarity. How many
        tokens it keeps depends on codebook and images, so tune it on some of them.
    """

    threshold: float = option(0.6, -1, 1)
    adaptive: ClassVar[bool] = True

    def choose(self, tokens: VisualTokens) -> Tensor:
        score = self.score(tokens)
        kept = (score > -self.threshold).index_fill(0, score.argmax(keepdim=True), True)
        return kept.nonzero().flatten()
