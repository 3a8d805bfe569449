"""How far later positions are from their columns, kept with each KV cache.

Models with several axes of positions count fewer of them for an image than it has tokens. By how many fewer they keep
on themselves, where it is that of whichever prompt came last: a conversation that goes on behind another prompt would
get positions of that one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from codebook.models.base import Model, cache_of

ON_MODEL = "rope_deltas"
"""Attribute of a base model that holds them, (B, 1) int64 or None, where it has one."""

Deltas = tuple[Tensor | None] | None
"""Those of one prompt; None where they are not known."""

_placing = threading.Lock()
"""Held from when a model is given those of a prompt until it has made positions of them."""


def has_deltas(model: Model) -> bool:
    """Whether a model keeps them on itself."""
    return ON_MODEL in vars(model.base_model)


def prepared(
    model: Model, stock: Callable[..., Any], inputs: Tensor, given: dict[str, Any]
) -> tuple[Any, Tensor | None]:
    """What `stock` makes of the arguments of `generate`: its positions; and the deltas of its prompt."""
    with _placing:
        _put(model, cache_of(given))
        positions = stock(inputs, given)
        return positions, getattr(model.base_model, ON_MODEL)


def begin(model: Model, given: dict[str, Any]) -> None:
    """Before a forward that makes positions by itself: give the model the deltas of its cache, or none."""
    cache = cache_of(given)
    if cache is None or not cache.get_seq_length():
        setattr(model.base_model, ON_MODEL, None)
    else:
        _put(model, cache)


def current(model: Model) -> Deltas:
    """Those that the model holds."""
    return (getattr(model.base_model, ON_MODEL),)


class Remembering(DynamicCache):
    """A `DynamicCache` with the deltas of its rows, which go where the rows go. A plain one becomes one in place."""

    deltas: Deltas

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._take(lambda deltas: deltas[beam_idx.to(deltas.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take(lambda deltas: deltas[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._take(lambda deltas: deltas.repeat_interleave(repeats, 0))

    def _take(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.deltas is not None and self.deltas[0] is not None:
            self.deltas = (rows(self.deltas[0]),)


def keep_with(cache: Any, deltas: Deltas, rows: int) -> None:
    """Keep with a cache of so many rows the deltas of the prompt that it holds."""
    if deltas is None or type(cache) not in (DynamicCache, Remembering):
        return
    [own] = deltas
    if own is not None and rows % len(own):
        return
    if own is not None:  # whose rows were repeated since, for beams
        own = own.repeat_interleave(rows // len(own), 0)
    cache.__class__, cache.deltas = Remembering, (own,)


def _put(model: Model, cache: Any) -> None:
    if isinstance(cache, Remembering) and cache.deltas is not None:
        setattr(model.base_model, ON_MODEL, cache.deltas[0])
