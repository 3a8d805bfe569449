"""Attention of a few queries without attention maps: the queries and keys of one layer, kept until the next begins.

The layer before a stage is pointed at an attention function that hands its rotated queries and keys over and then calls
the stock one. So sdpa stays on, and no projection, norm or rotary embedding is written again.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_taps: weakref.WeakKeyDictionary[Any, Callable[[Tensor, Tensor, float], None]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Attention:
    """What one layer attends with, for one sample, and where in it the image is.

    Attributes
    ----------
    query : (heads, P, d) float
        Rotated queries of the sample's P tokens, text and visual, in order, without padding.
    key : (key heads, P, d) float
        Rotated keys.
    cos, sin : (P, d) float
        The rotary embedding that rotated them.
    scaling : float
        Of the logits.
    span : slice
        The image's tokens.
    """

    query: Tensor
    key: Tensor
    cos: Tensor
    sin: Tensor
    scaling: float
    span: slice

    def row(self, query: int = -1, *, rotated: bool = True, image_only: bool = False) -> Tensor:
        """How much one token attends to each of the image's, averaged over heads.

        Parameters
        ----------
        query
            Its place in the sample; -1 is the last text token.
        rotated
            False takes the rotary embedding back off queries and keys (phi_-R of arXiv 2412.13180).
        image_only
            Softmax over the image's tokens instead of all tokens up to the query.

        Returns
        -------
        (n,) float32
        """
        query = query % self.query.shape[1]
        keys = self.span if image_only else slice(0, query + 1)
        q, k = self.query[:, query : query + 1], self.key[:, keys]
        if not rotated:
            q = _unrotate(q, self.cos[query : query + 1], self.sin[query : query + 1])
            k = _unrotate(k, self.cos[keys], self.sin[keys])
        k = k.repeat_interleave(len(q) // len(k), dim=0)
        weights = (q @ k.transpose(1, 2) * self.scaling)[:, 0].float().softmax(-1).mean(0)
        return weights if image_only else weights[self.span]


def _unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x * cos - turned * sin) / (cos**2 + sin**2)  # the divisor is 1 but for scaled rotary embeddings


def tap(module: Any, receive: Callable[[Tensor, Tensor, float], None]) -> Callable[[], None]:
    """Hand an attention module's rotated queries (B, heads, Q, d), keys (B, key heads, K, d) and scaling to `receive`.

    Returns the function that undoes it.
    """
    stock = module.config
    name = f"codebook|{stock._attn_implementation}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _tapped(stock._attn_implementation))
    module.config = copy.copy(stock)
    module.config._attn_implementation_internal = name
    _taps[module] = receive

    def undo() -> None:
        module.config = stock
        del _taps[module]

    return undo


def _tapped(stock: str) -> Callable[..., Any]:
    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        _taps[module](query, key, kwargs["scaling"])
        own = sys.modules[type(module).__module__].eager_attention_forward
        function = own if stock == "eager" else ALL_ATTENTION_FUNCTIONS[stock]
        return function(module, query, key, value, mask, **kwargs)

    return forward
