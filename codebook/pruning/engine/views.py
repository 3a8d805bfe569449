"""What a decoder layer needs to know of a shortened sequence: its cache's index, its mask, its rotary embeddings.

Stock models make one mask per forward from one layer's cache length. Here layers have caches of different lengths, so
each gets a mask of its own, made from columns alone: which columns its cache stores, and which the sequence holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from codebook.models import Family
from codebook.models.base import Model, chunk, decoder, rotary_at, window
from codebook.pruning.distance import distance_bias
from codebook.pruning.engine.cache import PAD, KeptIndex, visible
from codebook.pruning.engine.key_bias import KeyBias
from codebook.pruning.engine.sequence import Given, Shortened
from codebook.pruning.tokens import on_device


class View(NamedTuple):
    """What a layer is given.

    Attributes
    ----------
    kept
        The index of its cache after this forward.
    mask
        Its mask; None where attention is causal.
    bias
        What causal attention has to add to its logits; None where there is a mask, or nothing to add.
    rotary
        Its rotary embeddings, as its family's layers are given them: cos and sin, but for `Family.rotary`.
    """

    kept: KeptIndex
    mask: Tensor | None
    bias: KeyBias | None
    rotary: Any


class Cached(NamedTuple):
    """A layer's KV cache before this forward: its index if it was pruned, its logical length, its stored keys."""

    kept: KeptIndex | None
    logical: int
    stored: int


@dataclass(frozen=True)
class Viewer:
    """The maker of one forward's views.

    Attributes
    ----------
    given
        The forward's input.
    lengths
        Tokens of each row of it, padding not counted; empty if it shows no image.
    blocks : (B, L) int64 or None
        Tokens that see each other in both directions, as `Family.blocks` gives them.
    compact
        Whether positions are renumbered without gaps.
    """

    family: Family
    model: Model
    given: Given
    lengths: list[int]
    blocks: Tensor | None
    compact: bool

    def view(self, layer: Any, cached: Cached, sequence: Shortened | None, count: int, kwargs: dict[str, Any]) -> View:
        """The view of one layer, whose own arguments are `kwargs`, of the last `count` tokens of the sequence."""
        index, (cos, sin) = self._index(layer, cached, sequence), self._rotary(layer, cached.kept, sequence, kwargs)
        far = self._far(layer, sequence, (cos, sin))
        mask, bias = self._mask(layer, index, sequence, count, far)
        return View(index, mask, bias, self.family.rotary_given(cos[:, -count:], sin[:, -count:]))

    def weights(self, layer: Any, sequence: Shortened | None) -> tuple[Tensor | None, Tensor | None]:
        """The `bias` (B, P) of a sequence in this layer, and its `distant` (B, P) where the layer has positions."""
        if sequence is None:
            return None, None
        first = sequence.first is not None and layer is decoder(self.model).layers[0]
        placed = sequence.distant is not None and self.family.turned(self.model, layer) != "nothing"
        return sequence.first if first else sequence.bias, sequence.distant if placed else None

    def blocks_of(self, layer: Any) -> Tensor | None:
        """The `blocks` (B, L) that this layer heeds."""
        return self.blocks if window(layer) is not None or not self.family.window_blocks else None

    def since(self, layer: Any, queries: Tensor, row: int | None = None) -> Tensor | None:
        """The first column that each query (B, Q) of a layer sees, or of one row (Q,); None where all see the first."""
        if (reach := window(layer)) is not None:
            return queries - reach + 1
        if (size := chunk(layer)) is None:
            return None
        if self.given.mask is None:
            return queries // size * size
        first = (self.given.mask.cumsum(1) == 0).sum(1, keepdim=True)  # chunks are counted from a row's first token
        first = first if row is None else first[row]
        return first + (queries - first) // size * size

    def _far(self, layer: Any, sequence: Shortened | None, rotary: tuple[Tensor, Tensor]) -> Tensor | None:
        """(B, P, P) float32: what distance adds to the logits of a sequence's queries towards its keys.

        Only the prompt's queries: neither those that come after it nor those of later forwards.
        """
        distant = self.weights(layer, sequence)[1]
        if sequence is None or distant is None:
            return None
        asks = sequence.source < self.given.length - self.given.extra
        return distance_bias(rotary, rotary).where(asks[:, :, None] & distant[:, None], 0)

    def _index(self, layer: Any, cached: Cached, sequence: Shortened | None) -> KeptIndex:
        """Which columns the layer stores once this forward is through: those of its cache, then the sequence's."""
        past = self._unpruned(cached) if cached.kept is None else self._shown(cached.kept)
        places = torch.arange(self.given.length, device=self.given.device)
        if sequence is not None:
            source, padded, bias = sequence.source, sequence.padded, self.weights(layer, sequence)[0]
        else:
            on = self.given.valid().bool()
            # Decoding one token: it is valid, and asking the device would cost a sync at every step.
            padded = self.given.length > 1 and self.given.mask is not None and not bool(on.all())
            source, bias = torch.where(on, places, -1), None
        own = torch.where(source < 0, PAD, past.logical + source)
        if bias is not None or past.bias is not None:
            bias = torch.cat([_or_zeros(past.bias, past.columns), _or_zeros(bias, own)], dim=1)
        return KeptIndex(
            torch.cat([past.columns, own], dim=1),
            past.logical + self.given.length,
            self._dropped(past.dropped, sequence),
            past.padded or padded,
            bias,
        )

    def _dropped(self, before: Tensor | None, sequence: Shortened | None) -> Tensor | None:
        """`KeptIndex.dropped` after this forward."""
        if sequence is None or not self.compact:
            return before
        less = [a - b for a, b in zip(self.lengths, sequence.lengths, strict=True)]
        return on_device(less, self.given.device) + (0 if before is None else before)

    def _shown(self, kept: KeptIndex) -> KeptIndex:
        """An index without what the mask hides by now; while one token is decoded, as it is: asking costs a sync."""
        mask = self.given.mask
        return kept if mask is None or self.given.length == 1 else kept.shown(mask)

    def _unpruned(self, cached: Cached) -> KeptIndex:
        """The index of a cache that no stage has touched, or of none."""
        given, first = self.given, cached.logical - cached.stored
        columns = torch.arange(first, cached.logical, device=given.device).expand(given.batch, -1)
        padded = False
        if given.mask is not None and cached.stored:
            on = given.mask[:, first : cached.logical].bool()
            columns, padded = columns.masked_fill(~on, PAD), not bool(on.all())
        return KeptIndex(columns, cached.logical, None, padded)

    def _mask(
        self, layer: Any, index: KeptIndex, sequence: Shortened | None, count: int, far: Tensor | None
    ) -> tuple[Tensor | None, KeyBias | None]:
        """The mask (B, 1, Q, K), bool for sdpa where nothing is added to logits, else float; or what causal sdpa adds.

        Neither where the kernel is causal and nothing is to be added.
        """
        keys, blocks, reach = index.columns, self.blocks_of(layer), window(layer) or chunk(layer)
        queries = keys[:, -count:]
        reach = None if reach is None or index.logical <= reach else reach
        sdpa = decoder(self.model).config._attn_implementation == "sdpa"
        # Without a mask sdpa is causal by itself, but aligned to the upper left: only where nothing is cached.
        whole = keys.shape == queries.shape and sdpa
        causal, added = reach is None and blocks is None, index.padded or index.bias is not None
        if causal and not added and (queries.shape[1] == 1 or whole):
            return None, None
        if causal and whole and queries.shape[1] > 1 and far is None:
            # Columns ascend, so that what comes before a token and is no padding is what it sees.
            bias = _or_zeros(index.bias, keys)
            return None, KeyBias(bias.masked_fill(keys == PAD, torch.finfo(bias.dtype).min) if index.padded else bias)
        if causal and queries.shape[1] == 1 and index.bias is not None and not index.padded and far is None:
            return index.bias.to(self.given.embeds.dtype)[:, None, None], None  # the last token sees all keys
        both = None
        if blocks is not None:
            mine = blocks if sequence is None else sequence.gather(blocks)
            # What is cached belongs to no block: a block's tokens come in one forward.
            every = torch.cat([mine.new_full((len(keys), keys.shape[1] - mine.shape[1]), -1), mine], dim=1)
            both = mine[:, -count:], every
        since = None if reach is None else self.since(layer, queries)
        seen = visible(queries, keys, since, both, self.family.window_last)[:, None]
        if sdpa and index.bias is None:
            return seen, None
        bias = _or_zeros(index.bias, keys)[:, None, None]
        if far is not None:
            # Towards what is cached nothing.
            bias = bias + pad(far[:, -count:], (keys.shape[1] - far.shape[2], 0))[:, None]
        bias = bias.to(self.given.embeds.dtype)
        return torch.where(seen, bias, torch.finfo(bias.dtype).min), None

    def _rotary(
        self, layer: Any, past: KeptIndex | None, sequence: Shortened | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines: kept positions are gathered, compact ones counted anew, and those of a cache go on."""
        behind = None if past is None else past.dropped
        if behind is None and (sequence is None or not self.compact):
            cos, sin = self.family.rotary(kwargs["position_embeddings"])
            return (cos, sin) if sequence is None else (sequence.gather(cos), sequence.gather(sin))
        positions = kwargs["position_ids"].expand(self.given.batch, -1)
        if behind is not None:
            positions = positions - behind[:, None]
        if sequence is not None and not self.compact:
            positions = sequence.gather(positions)
        elif sequence is not None:
            before = sequence.gather(self.given.valid().long().cumsum(1)) - 1
            left = on_device([sequence.source.shape[1] - n for n in sequence.lengths], before.device)
            rank = torch.arange(sequence.source.shape[1], device=before.device) - left[:, None]
            positions = sequence.gather(positions) - (before - rank)
        module = self.family.rotary_module(self.model, layer)
        return self.family.rotary(rotary_at(module, self.given.embeds, positions, layer))


def _or_zeros(bias: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device) if bias is None else bias
