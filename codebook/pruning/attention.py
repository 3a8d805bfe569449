"""Attention of a few queries without attention maps: the queries and keys of one layer, kept until the next begins.

The layer before a stage, or the vision tower's that feeds the projector, is pointed at an attention function that hands
its queries and keys over and then calls the stock one. So sdpa stays on, and no projection, norm or rotary embedding is
written again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from codebook.errors import CodebookError
from codebook.models.base import Turned
from codebook.pruning.distance import distance_bias

QUERIES = 128
"""Rows of an attention map held at once."""


@dataclass(frozen=True)
class Attention:
    """Queries and keys of one layer for one sample, and the places of the image in it.

    Attributes
    ----------
    query : (heads, P, d) float
        Rotated queries of the sample's P tokens, text and visual, in order, without padding.
    key : (key heads, P, d) float
        Rotated keys.
    cos, sin : (P, d) float
        The rotary embedding that rotated them.
    scaling : float
        Factor of the logits.
    span : slice or (n,) int64
        The image's tokens.
    visible : callable
        `visible(query)` gives the keys of the P that some queries (q,) see: (q, P) bool. None: all up to their own.
    bias : (P,) float32 or None
        Number added to the logits towards each of the P: tokens that stand for several get more attention.
    turned
        What the rotary embedding turned.
    distant : (P,) bool or None
        Those of the P towards which logits also rise with distance (`codebook.pruning.distance`).
    """

    query: Tensor
    key: Tensor
    cos: Tensor
    sin: Tensor
    scaling: float
    span: slice | Tensor
    visible: Callable[[Tensor], Tensor] | None = None
    bias: Tensor | None = None
    turned: Turned = "halves"
    distant: Tensor | None = None

    @property
    def places(self) -> Tensor:
        """(n,) int64: places of the image's tokens in the sample."""
        return torch.arange(self.query.shape[1], device=self.query.device)[self.span]

    def row(self, query: int = -1, *, rotated: bool = True, image_only: bool = False) -> Tensor:
        """(n,) float32: `rows` of one place; -1 is the last text token."""
        query = query % self.query.shape[1]
        place = torch.arange(query, query + 1, device=self.query.device)
        return self.rows(place, rotated=rotated, image_only=image_only)[0]

    def rows(self, query: Tensor, *, rotated: bool = True, image_only: bool = False) -> Tensor:
        """Attention of some tokens to each of the image's, averaged over heads.

        Parameters
        ----------
        query : (q,) int64
            Their places in the sample.
        rotated
            False takes the rotary embedding back off queries and keys (phi_-R of arXiv 2412.13180).
        image_only
            Softmax over the image's tokens instead of all tokens that the query sees.

        Returns
        -------
        (q, n) float32

        Raises
        ------
        CodebookError
            If the rotary embedding is to be taken back where it is not known what it turned.
        """
        keys = self.span if image_only else slice(0, self.key.shape[1])
        k = self.key[:, keys] if rotated else self._unrotated(self.key[:, keys], keys)
        # All rows of a long question at once, heads by tokens by tokens, could fill the memory.
        return torch.cat([self._rows(part, k, keys, rotated, image_only) for part in query.split(QUERIES)])

    def _rows(self, query: Tensor, k: Tensor, keys: slice | Tensor, rotated: bool, image_only: bool) -> Tensor:
        q = self.query[:, query] if rotated else self._unrotated(self.query[:, query], query)
        logits = _logits(q, k, self.scaling).unflatten(1, (-1, len(query)))
        if self.bias is not None:
            logits = logits + self.bias[keys]
        if self.distant is not None:
            far = distance_bias((self.cos[query], self.sin[query]), (self.cos[keys], self.sin[keys]))
            logits = logits + far.where(self.distant[keys], 0)
        if image_only:
            return logits.softmax(-1).mean((0, 1))
        if self.visible is None:
            seen = torch.arange(k.shape[1], device=k.device) <= query[:, None]
        else:
            seen = self.visible(query)
        return logits.masked_fill(~seen, -torch.inf).softmax(-1)[..., self.span].mean((0, 1))

    def _unrotated(self, x: Tensor, places: Tensor | slice) -> Tensor:
        if self.turned == "nothing":
            return x
        if self.turned == "other":
            raise CodebookError(
                "this model's rotary embeddings cannot be taken back: use a method that leaves them, such as fastv"
            )
        cos, sin = self.cos[places], self.sin[places]
        x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        if self.turned == "pairs":
            other = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        else:
            half = x.shape[-1] // 2
            other = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        factor = cos**2 + sin**2  # 1 but for scaled rotary embeddings
        turned = x * (cos / factor) - other * (sin / factor)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


class TowerAttention(ABC):
    """Attention of one layer of the vision tower to the tokens of an image."""

    @abstractmethod
    def received(self) -> Tensor:
        """(n,) float32: the attention that each gets from [CLS] (from all patches if there is none), over all heads."""

    @abstractmethod
    def descriptors(self) -> Tensor:
        """(n, d) float32: their keys, averaged over heads."""

    @abstractmethod
    def lengths(self) -> Tensor:
        """(n,) float32: the lengths of their keys, all heads in one vector."""


@dataclass(frozen=True)
class Vision(TowerAttention):
    """Queries and keys of one layer of the vision tower, for one image, crop or frame.

    Attributes
    ----------
    query, key : (heads, N, d) float
        Queries and keys of the [CLS] token, where the tower has one, and the patches in raster order. Keys may have
        fewer heads, each for several of the queries'.
    scaling : float
        Factor of the logits.
    has_cls : bool
        Whether the first of the N is [CLS].
    """

    query: Tensor
    key: Tensor
    scaling: float
    has_cls: bool

    def received(self) -> Tensor:
        queries = self.query[:, :1] if self.has_cls else self.query
        logits = (_logits(part, self.key, self.scaling) for part in queries.split(QUERIES, dim=1))
        total = reduce(torch.add, (part.softmax(-1).sum((0, 1)) for part in logits))
        return total[int(self.has_cls) :] / (queries.shape[0] * queries.shape[1])

    def descriptors(self) -> Tensor:
        return self.key[:, int(self.has_cls) :].float().mean(0)

    def lengths(self) -> Tensor:
        # One dimension after the other: several times as fast as both at once on a CPU.
        return self.key[:, int(self.has_cls) :].float().norm(dim=2).norm(dim=0)


@dataclass(frozen=True)
class Tower:
    """Queries and keys of one layer of the vision tower, for all images of one call.

    Attributes
    ----------
    parts
        Attention per image, crop or frame.
    pack
        Brings their patches' values into the order of visual tokens: `Family.pack`.
    """

    parts: list[Vision]
    pack: Callable[[list[Tensor]], list[Tensor]]

    @cached_property
    def received(self) -> list[Tensor]:
        """For each piece that was encoded, its tokens (n,) float32."""
        return [x[:, 0] for x in self.pack([part.received()[:, None] for part in self.parts])]

    @cached_property
    def descriptors(self) -> list[Tensor]:
        """For each piece that was encoded, its tokens (n, d) float32."""
        return self.pack([part.descriptors() for part in self.parts])

    @cached_property
    def lengths(self) -> list[Tensor]:
        """For each piece that was encoded, its tokens (n,) float32."""
        return [x[:, 0] for x in self.pack([part.lengths()[:, None] for part in self.parts])]


@dataclass(frozen=True)
class PackedVision(TowerAttention):
    """The averages over each token's patches, for tokens `index` (n,) int64 of an image made of `pieces` of a tower."""

    tower: Tower
    pieces: tuple[int, ...]
    index: Tensor

    def received(self) -> Tensor:
        return torch.cat([self.tower.received[i] for i in self.pieces])[self.index]

    def descriptors(self) -> Tensor:
        return torch.cat([self.tower.descriptors[i] for i in self.pieces])[self.index]

    def lengths(self) -> Tensor:
        return torch.cat([self.tower.lengths[i] for i in self.pieces])[self.index]


def _logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Products of queries (heads, q, d) and keys (key heads, n, d), scaled: (key heads, heads per key head * q, n).

    Heads that share keys stand side by side, so that no key is repeated. float32: without their scaling, products of
    large keys are more than float16 holds. Its power of two is the queries', which takes nothing from their digits.
    """
    rest, power = math.frexp(scaling)
    grouped = (query * 2.0**power).unflatten(0, (len(key), -1)).flatten(1, 2)
    return (grouped @ key.transpose(1, 2)).float() * rest
