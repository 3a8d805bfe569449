"""How far later positions are from their columns, kept with each KV cache.

Models with several axes of positions count fewer of them for an image than it has tokens. By how many fewer they keep
on themselves, where it is that of whichever prompt came last: a conversation that goes on behind another prompt would
get positions of that one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from codebook.models.base import Model, cache_of

ON_MODEL = "rope_deltas"
"""Attribute of a base model that holds them, (B, 1) int64 or None, where it has one."""
ON_CACHE = "_codebook_rope_deltas"

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


def keep_with(cache: Any, deltas: Deltas) -> None:
    """Keep with a cache the deltas of the prompt that it holds."""
    if cache is not None and deltas is not None:
        setattr(cache, ON_CACHE, deltas)


def _put(model: Model, cache: Any) -> None:
    if (deltas := getattr(cache, ON_CACHE, None)) is not None:
        setattr(model.base_model, ON_MODEL, deltas[0])
