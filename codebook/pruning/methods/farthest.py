"""Farthest points: tokens unlike each other and, with a codebook, unlike everything that is redundant to the model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from codebook.pruning.methods.base import FeaturePruner, gram, option

if TYPE_CHECKING:
    from codebook.store.codebook import Codebook

AT_ONCE = 2**26
"""Similarities held at once: of 200 images of 576 tokens, a quarter of a gigabyte."""

ROW_BY_ROW = 1024, 16
"""Tokens, and tokens per kept one, above which the similarities of all pairs cost more than those to each chosen."""


class Farthest(FeaturePruner):
    """Again and again the token furthest from all chosen, by cosine distance of projector outputs.

    Attributes
    ----------
    representatives
        How many of the tokens that stay are chosen for the others instead, as in `farthest_points`.
    """

    representatives: int = 0

    @abstractmethod
    def begin(self, features: Tensor, similarity: Tensor) -> Tensor:
        """What the first choice goes by.

        Parameters
        ----------
        features : (n, d) float
            Projector outputs of one image.
        similarity : (n, n) float32
            Cosine similarities of its tokens.

        Returns
        -------
        (n,) float32, `nearest` of `farthest_points`; to say where to begin and nothing more: less than any similarity
        """

    def select_each(self, features: Tensor, keep: int) -> Tensor:
        chosen = []
        for part in features.split(max(1, AT_ONCE // features.shape[1] ** 2)):
            # Image by image: products of several matrices at once may be rounded in another way, and what an image
            # keeps would depend on its neighbours.
            similarity = torch.stack([gram(unit) for unit in normalize(part.float(), dim=-1)])
            nearest = torch.stack([self.begin(*own) for own in zip(part, similarity, strict=True)])
            chosen.append(farthest_points(similarity, nearest, keep, self.representatives))
        return torch.cat(chosen)


@dataclass(frozen=True)
class FarthestPoint(Farthest):
    """Farthest-point sampling (Gonzalez, 1985), begun with the token least like the image's mean."""

    representatives: int = option(0, 0)

    def begin(self, features: Tensor, similarity: Tensor) -> Tensor:
        return _likeness_to_mean(features) - 3

    def select_each(self, features: Tensor, keep: int) -> Tensor:
        least, per_kept = ROW_BY_ROW
        if self.representatives or features.shape[1] <= max(least, per_kept * keep):
            return super().select_each(features, keep)
        return torch.stack([_row_by_row(own, keep) for own in features])


def _likeness_to_mean(features: Tensor) -> Tensor:
    features = features.float()
    return cosine_similarity(features, features.mean(0, keepdim=True))


def _row_by_row(features: Tensor, keep: int) -> Tensor:
    """What `FarthestPoint` keeps of one image, from keep * n similarities."""
    unit = normalize(features.float(), dim=-1)
    nearest, chosen = _likeness_to_mean(features) - 3, []
    for _ in range(keep):
        pick = nearest.argmin(keepdim=True)
        chosen.append(pick)
        nearest = torch.maximum(nearest, unit @ unit.index_select(0, pick)[0]).index_fill_(0, pick, torch.inf)
    return torch.cat(chosen).sort().values


@dataclass(frozen=True)
class SeededFarthestPoint(Farthest):
    """Farthest-point sampling in which the codebook's prototypes count as chosen.

    A token is kept for being far from everything redundant and from everything kept.

    Attributes
    ----------
    codebook
        Prototypes of the model that is pruned.
    """

    codebook: Codebook
    representatives: int = option(4, 0)

    def begin(self, features: Tensor, similarity: Tensor) -> Tensor:
        return self.codebook.redundancy(features)


def farthest_points(similarity: Tensor, nearest: Tensor, keep: int, representatives: int = 0) -> Tensor:
    """The points furthest from what is chosen, and a few that the others are like, of each of several sets.

    Each farthest point is the one whose highest similarity to anything chosen is the lowest. Then each representative
    is the one that most raises the sum, over all points, of the highest similarity to a point that stays: the greedy
    maximum of facility location (Nemhauser et al., 1978). No more than half of what stays are representatives. The cost
    is n for each farthest point and n * n for each representative, without a host sync.

    Parameters
    ----------
    similarity : (B, n, n) float32
        Contiguous.
    nearest : (B, n) float32
        Highest similarity of each to what counts as chosen beforehand.
    keep
        How many of each set stay, 1 <= keep <= n.
    representatives
        How many of these stand for the others.

    Returns
    -------
    (B, keep) int64, each row ascending
    """
    count = similarity.shape[1]
    rows = similarity.flatten(0, 1)
    first = torch.arange(len(similarity), device=rows.device) * count
    itself = similarity.diagonal(dim1=1, dim2=2)
    own = itself.clone()
    itself.fill_(torch.inf)  # what is chosen is never furthest again
    chosen = []
    for _ in range(keep - min(representatives, keep // 2)):
        chosen.append(nearest.argmin(1))
        nearest = torch.maximum(nearest, rows.index_select(0, first + chosen[-1]))
    itself.copy_(own)
    covered = rows[first[:, None] + torch.stack(chosen, 1)].amax(1)
    for _ in range(len(chosen), keep):
        gain = (similarity - covered[:, None]).clamp_(min=0).sum(2).scatter(1, torch.stack(chosen, 1), -torch.inf)
        chosen.append(gain.argmax(1))
        covered = torch.maximum(covered, rows.index_select(0, first + chosen[-1]))
    return torch.stack(chosen, 1).sort(1).values
