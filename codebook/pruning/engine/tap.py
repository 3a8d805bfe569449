"""Taps on attention modules: their queries and keys, handed over as they are computed, and numbers added to logits."""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from codebook.pruning.engine.key_bias import ADDED, attend

Receive = Callable[[Tensor, Tensor, float], None]

_taps: weakref.WeakKeyDictionary[Any, tuple[Any, list[Receive]]] = weakref.WeakKeyDictionary()
"""The config of each tapped module, as it was, and its receivers."""
_taps_lock = threading.Lock()
LISTENING: ContextVar[bool] = ContextVar("listening", default=False)
"""Whether this thread runs an attention module for its queries and keys alone."""


def tap(module: Any, receive: Receive) -> Callable[[], None]:
    """Hand an attention module's queries (B, heads, Q, d), keys (B, key heads, K, d) and scaling to `receive`.

    They are as the attention function gets them: rotated in an LLM. A receiver that taps a module twice is called once.
    Answers are the same with and without taps, so other threads may run the module meanwhile. Returns the function that
    undoes it.
    """
    with _taps_lock:
        if module not in _taps:
            stock = module.config
            # Another config: only attention of tapped modules is looked up under the new name. They share one, since
            # to make it takes long.
            config = next((other.config for other, (own, _) in _taps.items() if own is stock), None) or _named(stock)
            module.config = config
            _taps[module] = stock, []
        _taps[module][1].append(receive)

    def undo() -> None:
        with _taps_lock:
            stock, receivers = _taps[module]
            receivers.remove(receive)
            if not receivers:
                module.config = stock
                del _taps[module]

    return undo


def _named(stock: Any) -> Any:
    """A copy of a config under which attention is ours."""
    name = f"codebook|{stock._attn_implementation}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _tapped(stock._attn_implementation))
    config = copy.copy(stock)
    config._attn_implementation_internal = name
    return config


def point(module: Any) -> Callable[[], None]:
    """Have an attention module add what `ADDED` holds; returns the function that undoes it."""
    return tap(module, lambda *_: None)


def overhear(module: Any, *args: Any, **kwargs: Any) -> None:
    """Run a tapped attention module for its queries and keys alone: nothing attends, and nothing comes of it."""
    token = LISTENING.set(True)
    try:
        module(*args, **kwargs)
    finally:
        LISTENING.reset(token)


def replay(module: Any, query: Tensor, key: Tensor, scaling: float) -> None:
    """Hand to whoever taps the module what it attended with, now or in an earlier forward."""
    with _taps_lock:
        receivers = dict.fromkeys(_taps[module][1]) if module in _taps else {}
    for receive in receivers:
        receive(query, key, scaling)


def _tapped(stock: str) -> Callable[..., Any]:
    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        replay(module, query, key, kwargs["scaling"])
        if LISTENING.get():
            # Of the shape that the module expects: values may have other heads than queries, and another width.
            return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[-1]), None
        own = sys.modules[type(module).__module__].eager_attention_forward
        function = own if stock == "eager" else ALL_ATTENTION_FUNCTIONS[stock]
        if (bias := ADDED.get()) is not None:
            ADDED.set(None)
            return attend(function, module, query, key, value, bias, **kwargs)
        return function(module, query, key, value, attention_mask, **kwargs)

    return forward
