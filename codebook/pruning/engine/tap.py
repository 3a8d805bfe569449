"""Taps on attention modules: their queries and keys, handed over as they are computed, and numbers added to logits."""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from codebook.pruning.engine.key_bias import ADDED, attend

Receive = Callable[[Tensor, Tensor, float], None]


@dataclass
class _Pointed:
    """A module's config as it was, how many have it use our function, and who hears what it attends with."""

    stock: Any
    users: int = 0
    receivers: list[Receive] = field(default_factory=list)


_pointed: weakref.WeakKeyDictionary[Any, _Pointed] = weakref.WeakKeyDictionary()
"""What is known of each module whose attention is ours."""
_pointed_lock = threading.Lock()
LISTENING: ContextVar[bool] = ContextVar("listening", default=False)
"""Whether this thread runs an attention module for its queries and keys alone."""


def tap(module: Any, receive: Receive) -> Callable[[], None]:
    """Hand an attention module's queries (B, heads, Q, d), keys (B, key heads, K, d) and scaling to `receive`.

    They are as the attention function gets them: rotated in an LLM. A receiver that taps a module twice is called once.
    Answers are the same with and without taps, so other threads may run the module meanwhile. Returns the function that
    undoes it.
    """
    unpoint = point([module])
    with _pointed_lock:
        _pointed[module].receivers.append(receive)

    def undo() -> None:
        with _pointed_lock:
            _pointed[module].receivers.remove(receive)
        unpoint()

    return undo


def point(modules: Sequence[Any]) -> Callable[[], None]:
    """Have attention modules use our function, which adds what `ADDED` holds; returns the function that undoes it."""
    with _pointed_lock:
        # Another config: only attention of these modules is looked up under the new name. They share one, since to make
        # it takes long.
        configs = {id(own.stock): module.config for module, own in _pointed.items()}
        for module in modules:
            own = _pointed.get(module)
            if own is None:
                own = _pointed[module] = _Pointed(module.config)
                if id(own.stock) not in configs:
                    configs[id(own.stock)] = _named(own.stock)
                _configure(module, configs[id(own.stock)])
            own.users += 1

    def undo() -> None:
        with _pointed_lock:
            for module in modules:
                own = _pointed[module]
                own.users -= 1
                if not own.users:
                    _configure(module, own.stock)
                    del _pointed[module]

    return undo


def _configure(module: Any, config: Any) -> None:
    # Past `Module.__setattr__`, which asks a config at length whether it is a parameter.
    vars(module)["config"] = config


def _named(stock: Any) -> Any:
    """A copy of a config under which attention is ours."""
    name = f"codebook|{stock._attn_implementation}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _tapped)
    config = copy.copy(stock)
    config._attn_implementation_internal = name
    return config


def overhear(module: Any, *args: Any, **kwargs: Any) -> None:
    """Run a tapped attention module for its queries and keys alone: nothing attends, and nothing comes of it."""
    token = LISTENING.set(True)
    try:
        module(*args, **kwargs)
    finally:
        LISTENING.reset(token)


def replay(module: Any, query: Tensor, key: Tensor, scaling: float) -> None:
    """Hand to whoever taps the module what it attended with, now or in an earlier forward."""
    with _pointed_lock:
        own = _pointed.get(module)
        receivers = {} if own is None else dict.fromkeys(own.receivers)
    for receive in receivers:
        receive(query, key, scaling)


def _tapped(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    if kwargs["scaling"] is None:
        kwargs["scaling"] = query.shape[-1] ** -0.5  # as sdpa has it
    replay(module, query, key, kwargs["scaling"])
    if LISTENING.get():
        # Of the shape that the module expects: values may have other heads than queries, and another width.
        return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[-1]), None
    function = _stock(module)
    if (bias := ADDED.get()) is not None:
        ADDED.set(None)
        return attend(function, module, query, key, value, bias, **kwargs)
    return function(module, query, key, value, attention_mask, **kwargs)


def _stock(module: Any) -> Callable[..., Any]:
    """The attention function that a module would use, were it not ours.

    The masks are made for what the model's config says now, which may have been changed since the module was pointed.
    """
    with _pointed_lock:
        own = _pointed.get(module)
    # Undone by another thread meanwhile: the module's config is its own again.
    name = (module.config if own is None else own.stock)._attn_implementation
    eager = sys.modules[type(module).__module__].eager_attention_forward if name == "eager" else None
    return eager or ALL_ATTENTION_FUNCTIONS[name]
