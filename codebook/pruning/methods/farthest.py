"""Farthest points: tokens unlike each other and, with a codebook, unlike everything that is redundant to the model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.pruning.methods.base import (
    AT_ONCE,
    FeaturePruner,
    gram,
    middles,
    nearest_kept_each,
    option,
)
from codebook.pruning.methods.centring import centred_gate

if TYPE_CHECKING:
    from codebook.store.codebook import Codebook

ROW_BY_ROW = 1024, 16
"""Tokens, and tokens per kept one, above which the similarities of all pairs cost more than those to each chosen."""


class Farthest(FeaturePruner):
    """Again and again the token furthest from all chosen, by cosine distance of projector outputs.

    Attributes
    ----------
    representatives
        How many of the tokens that stay are chosen to stand for the others instead, as in `farthest_points`; at most
        half of them.
    centred
        Compare the tokens less the image's mean, and let a token's distance count times its gate (`centred_gate`,
        Cen-Prune).
    middle
        Keep the middle one, in raster order, of those that each chosen token stands for in its place (`middles`). What
        is furthest is an extreme of what is alike, now at its top and now at its bottom, so that the order of what
        stays is not that of the things in the image.
    """

    representatives: int = 0
    centred: bool = option(False)
    middle: bool = option(False)

    @abstractmethod
    def begin(self, features: Tensor, similarity: Tensor, gate: Tensor | None) -> Tensor:
        """What the first choice goes by.

        Parameters
        ----------
        features : (n, d) float
            Projector outputs of one image.
        similarity : (n, n) float32
            Cosine similarities of its tokens.
        gate : (n,) float32 or None
            What their distances count times, if they do.

        Returns
        -------
        (n,) float32, `nearest` of `farthest_points`; `beginning_at` says where to begin and nothing more
        """

    def select_each(self, features: Tensor, keep: int) -> Tensor:
        chosen = []
        for part in features.split(max(1, AT_ONCE // features.shape[1] ** 2)):
            # Image by image: products of several matrices at once may be rounded in another way, and what an image
            # keeps would depend on its neighbours.
            views = [self._view(own) for own in part]
            similarity = torch.stack([similarity for similarity, _, _ in views])
            nearest = torch.stack([nearest for _, nearest, _ in views])
            gates = [gate for _, _, gate in views if gate is not None]
            gate = torch.stack(gates) if gates else None
            index = farthest_points(similarity, nearest, keep, self.representatives, gate)
            if self.middle:
                rows, first = _stacked_rows(part)
                own = first[:, None] + torch.arange(part.shape[1], device=part.device)
                index = middles(nearest_kept_each(rows, own, index), keep).sort(1).values
            chosen.append(index)
        return torch.cat(chosen)

    def _view(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Similarities of one image's tokens, what `farthest_points` begin with, and the gate, if there is one."""
        directions, gate = centred_gate(features) if self.centred else (normalize(features.float(), dim=-1), None)
        similarity = gram(directions)
        return similarity, self.begin(features, similarity, gate), gate


@dataclass(frozen=True)
class FarthestPoint(Farthest):
    """Farthest-point sampling (Gonzalez, 1985), begun with the token least like the image's mean.

    Attributes
    ----------
    representatives, centred, middle
        As in `Farthest`.
    """

    representatives: int = option(0, 0)
    centred: bool = option(False)
    middle: bool = option(False)

    def begin(self, features: Tensor, similarity: Tensor, gate: Tensor | None) -> Tensor:
        return beginning_at(_likeness_to_mean(features).argmin(keepdim=True), similarity)

    def select_each(self, features: Tensor, keep: int) -> Tensor:
        least, per_kept = ROW_BY_ROW
        if self.representatives or self.centred or self.middle or features.shape[1] <= max(least, per_kept * keep):
            return super().select_each(features, keep)
        return torch.stack([_row_by_row(own, keep) for own in features])


def _likeness_to_mean(features: Tensor) -> Tensor:
    features = features.float()
    # `cosine_similarity` would go over all numbers several times more, half as long as all products of the tokens.
    return normalize(features, dim=-1) @ normalize(features.mean(0), dim=0)


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

    A token is kept for being far from everything redundant and from everything kept. Prototypes are compared as they
    are, also where `centred` takes the image's mean from its tokens: less that mean most of them point one way.

    Attributes
    ----------
    codebook
        Prototypes of the model that is pruned.
    representatives, centred, middle
        As in `Farthest`.
    """

    codebook: Codebook
    representatives: int = option(4, 0)
    centred: bool = option(False)
    middle: bool = option(False)

    def begin(self, features: Tensor, similarity: Tensor, gate: Tensor | None) -> Tensor:
        return self.codebook.redundancy(features)


def beginning_at(first: Tensor, similarity: Tensor) -> Tensor:
    """(n,) what `farthest_points` begin with where the point `first` (1,) is to be first and nothing is chosen yet."""
    return torch.full_like(similarity[0], -2).index_fill(0, first, -torch.inf)


def furthest(nearest: Tensor, gate: Tensor | None = None) -> Tensor:
    """(B,) int64: of each set the point that is furthest from what is chosen, by its distance times its gate."""
    if gate is None:
        return nearest.argmin(1)
    # Above 0, so that what is chosen already comes behind a point whose gate is shut.
    return (gate.clamp(min=torch.finfo(gate.dtype).tiny) * (1 - nearest)).argmax(1)


def farthest_in_turn(similarity: Tensor, nearest: Tensor, count: int, gate: Tensor | None = None) -> Tensor:
    """The points furthest from what is chosen, one after the other, of each of several sets.

    Each is the one whose highest similarity to anything chosen is the lowest. The cost is n for each, without a host
    sync.

    Parameters
    ----------
    similarity, nearest, gate
        As for `farthest_points`. A `nearest` of infinity is a point that is never chosen.
    count
        How many points.

    Returns
    -------
    (B, count) int64, in the order of choice
    """
    rows, first = _stacked_rows(similarity)
    itself = similarity.diagonal(dim1=1, dim2=2)
    own = itself.clone()
    itself.fill_(torch.inf)  # what is chosen is never furthest again
    chosen = [first[:, None][:, :0]]
    for _ in range(count):
        pick = furthest(nearest, gate)
        chosen.append(pick[:, None])
        nearest = torch.maximum(nearest, rows.index_select(0, first + pick))
    itself.copy_(own)
    return torch.cat(chosen, 1)


def farthest_points(
    similarity: Tensor, nearest: Tensor, keep: int, representatives: int = 0, gate: Tensor | None = None
) -> Tensor:
    """The points furthest from what is chosen, and a few that the others are like, of each of several sets.

    After the farthest points (`farthest_in_turn`) each representative is the one that most raises the sum, over all
    points, of the highest similarity to a point that stays: the greedy maximum of facility location (Nemhauser et al.,
    1978). No more than half of what stays are representatives. The cost is n for each farthest point and n * n for each
    representative, without a host sync.

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
    gate : (B, n) float32 or None
        What the distance of each, one less its highest similarity, counts times; 0 or more.

    Returns
    -------
    (B, keep) int64, each row ascending
    """
    rows, first = _stacked_rows(similarity)
    points = farthest_in_turn(similarity, nearest, keep - min(representatives, keep // 2), gate)
    covered = rows[first[:, None] + points].amax(1)
    chosen = list(points.unbind(1))
    for _ in range(len(chosen), keep):
        gain = (similarity - covered[:, None]).clamp_(min=0).sum(2).scatter(1, torch.stack(chosen, 1), -torch.inf)
        chosen.append(gain.argmax(1))
        covered = torch.maximum(covered, rows.index_select(0, first + chosen[-1]))
    return torch.stack(chosen, 1).sort(1).values


def _stacked_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (B * n, d) of several matrices (B, n, d), and the number (B,) of each one's first."""
    return x.flatten(0, 1), torch.arange(len(x), device=x.device) * x.shape[1]
