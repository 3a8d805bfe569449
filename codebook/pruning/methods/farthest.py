"""Farthest points: tokens unlike each other and, with a codebook, unlike everything that is redundant to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from codebook.errors import CodebookError
from codebook.pruning.methods.base import Pruner
from codebook.pruning.tokens import VisualTokens

if TYPE_CHECKING:
    from codebook.index import Codebook


@dataclass(frozen=True)
class FarthestPoint(Pruner):
    """Farthest-point sampling by cosine distance of projector outputs (Gonzalez, 1985).

    First the token least like the image's mean, then again and again the one furthest from all chosen.

    Attributes
    ----------
    representatives
        How many of the tokens that stay are chosen for the others instead, as in `farthest_points`.
    """

    representatives: int = 0

    def __post_init__(self) -> None:
        check_representatives(self.representatives)

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        features = tokens.features.float()
        # Less than any similarity: it says where to begin and nothing more.
        start = cosine_similarity(features, features.mean(0, keepdim=True)) - 3
        return farthest_points(features, start, keep, self.representatives)


@dataclass(frozen=True)
class SeededFarthestPoint(Pruner):
    """Farthest-point sampling in which the codebook's prototypes count as chosen.

    A token is kept for being far from everything redundant and from everything kept; distances are cosine distances of
    projector outputs.

    Attributes
    ----------
    codebook
        Of the model that is pruned.
    representatives
        How many of the tokens that stay are chosen for the others instead, as in `farthest_points`.
    """

    codebook: Codebook
    representatives: int = 4

    def __post_init__(self) -> None:
        check_representatives(self.representatives)

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        redundancy = self.codebook.redundancy(tokens.features)
        return farthest_points(tokens.features.float(), redundancy, keep, self.representatives)


def check_representatives(count: int) -> None:
    """Raise a CodebookError unless `count` is 0 or more."""
    if count < 0:
        raise CodebookError(f"representatives is {count}: give 0 or more")


def farthest_points(features: Tensor, nearest: Tensor, keep: int, representatives: int) -> Tensor:
    """The points furthest from what is chosen, and a few that the others are like.

    Each farthest point is the one whose highest similarity to anything chosen is the lowest. Then each representative
    is the one that most raises the sum, over all points, of the highest similarity to a point that stays: the greedy
    maximum of facility location (Nemhauser et al., 1978). No more than half of what stays are representatives. The cost
    is n * n * d for the similarities, n for each farthest point and n * n for each representative, without a host sync.

    Parameters
    ----------
    features : (n, d) float32
    nearest : (n,) float32
        Highest cosine similarity of each to what counts as chosen beforehand.
    keep
        How many stay, 1 <= keep <= n.
    representatives
        How many of these stand for the others.

    Returns
    -------
    (keep,) int64, ascending
    """
    unit = normalize(features, dim=-1)
    similarity = unit @ unit.T
    chosen = torch.empty(keep, dtype=torch.long, device=unit.device)
    own = keep - min(representatives, keep // 2)
    for i in range(own):
        # One place, not a number: indexing with a number on the device waits for it.
        chosen[i : i + 1] = pick = nearest.argmin(keepdim=True)
        # What is chosen, at infinity, stays there.
        nearest = torch.maximum(nearest, similarity[pick][0]).index_fill(0, pick, torch.inf)
    covered = similarity[chosen[:own]].amax(0)
    for i in range(own, keep):
        gain = (similarity - covered).clamp_(min=0).sum(1).index_fill(0, chosen[:i], -torch.inf)
        chosen[i : i + 1] = pick = gain.argmax(keepdim=True)
        covered = torch.maximum(covered, similarity[pick][0])
    return chosen.sort().values
