"""Causal attention with one number per key added to the logits, without a mask of queries by keys.

softmax over k of (scaling q . k + b_k): b is the logarithm of how many tokens a kept token stands for, and at padding
the least number there is. sdpa's public function takes b as a mask alone, which is as large as the attention map and
keeps kernels from leaving out what comes after a query. Three ways say the same:

- **row**: torch's CPU kernel takes a mask of one row, in float32, beside causality. Its public function does not, and
  also checks what the kernel takes for granted: that entries of a head lie side by side, and that a mask in float32 is
  not for queries in float64.
- **fold**: with more entries per head, queries [q, 1, 1, 1, 0 ..] and keys [k, x, y, z, 0 ..], where x + y + z is
  b / scaling, the product is scaling q . k + b, and no mask is left: flash kernels run. x is b / scaling in the keys'
  dtype, y and z are what that has rounded off: three bfloat16 hold the 24 bits of a float32. Eight entries are added,
  since kernels want widths that are multiples of 8; values get zeros, since flash kernels want one width.
- **mask**: wherever neither is known to be right and faster.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

WIDER = 8
"""Entries that folding adds to each head."""
BIAS_PARTS = 3
"""How many of them hold a key's number."""
FOLD_FROM = 3072
"""Tokens from which folding is used on CUDA: below, copying queries, keys and values takes longer than a mask.

Measured on one H200 (docs/device.md): equal at 2944 tokens.
"""
FLASH_WIDTH = 256
"""Entries per head that flash kernels take at most."""
NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes to whose products a float32 can be added."""

Adding = Literal["row", "fold", "mask"]

_row_kernel = torch._scaled_dot_product_flash_attention_for_cpu


@cache
def shares_keys() -> bool:
    """Whether torch's CPU kernel knows heads that share keys: in torch 2.8 it reads beyond the keys, without a word."""
    with torch.inference_mode(False), torch.no_grad():
        # Two heads share the first of two keys; the second, next to it, is what such a kernel would read.
        there = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
        out = _row_kernel(torch.ones_like(there), there[:, :1], there[:, :1], 0.0, True, scale=1.0)[0]
    return not out.any()


class KeyBias:
    """One number per key, and what is made of it once for all layers that share it.

    Attributes
    ----------
    row : (B, K) float32
        What is added to the logits of every query towards each of the K keys.
    line : (B, 1, 1, K) float32
        The same, as a mask of one row.
    """

    def __init__(self, row: Tensor) -> None:
        self.row = row
        self.line = row[:, None, None]
        self._masks: dict[torch.dtype, Tensor] = {}
        self._folded: dict[tuple[torch.dtype, float], Tensor] = {}

    def mask(self, dtype: torch.dtype) -> Tensor:
        """(B, 1, K, K) in `dtype`: the numbers, and the least there is where a query does not see the key."""
        if dtype not in self._masks:
            places, low = torch.arange(self.row.shape[1], device=self.row.device), torch.finfo(dtype).min
            row = self.line.to(dtype).clamp(min=low)
            self._masks[dtype] = torch.where(places <= places[:, None], row, low)
        return self._masks[dtype]

    def folded(self, scaling: float, dtype: torch.dtype) -> Tensor:
        """(B, 1, K, 8) in `dtype`: what is added to each key, so that the numbers are in its products."""
        if (dtype, scaling) not in self._folded:
            # Half of the least, so that no product of a padding key is more than there is.
            left = (self.row / scaling).clamp(min=torch.finfo(dtype).min / 2)
            out = self.row.new_zeros(*self.row.shape, WIDER, dtype=dtype)
            for i in range(BIAS_PARTS):
                out[..., i] = left
                left = left - out[..., i].float()
            self._folded[dtype, scaling] = out[:, None]
        return self._folded[dtype, scaling]


ADDED: ContextVar[KeyBias | None] = ContextVar("codebook_added", default=None)
"""What the attention that this thread or task runs next must add to its logits; whoever adds it sets it to None."""


def best_way(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Adding:
    """How to add numbers to the logits of these queries (B, heads, K, d), keys and values (B, key heads, K, d)."""
    width, dtype, device = key.shape[-1], query.dtype, query.device.type
    if dropout or dtype not in NARROW or not dtype == key.dtype == value.dtype or width != value.shape[-1]:
        return "mask"
    if device == "cpu":  # asked at every layer: written out, it takes half as long
        learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        known = query.shape[1] == key.shape[1] or shares_keys()
        laid = query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        return "row" if known and laid and not learning else "mask"
    long = device == "cuda" and query.shape[2] >= FOLD_FROM
    return "fold" if long and width + WIDER <= FLASH_WIDTH else "mask"


def attend(
    stock: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor, bias: KeyBias, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Causal attention with numbers added to its logits, in the place of transformers' attention function for sdpa.

    Parameters
    ----------
    stock
        That function.
    query : (B, heads, K, d) float
    key, value : (B, key heads, K, d) float
    kwargs
        What the module gives its attention function, `scaling` among it.

    Returns
    -------
    output : (B, K, heads, d)
    None
        In the place of attention maps.
    """
    way, scaling = best_way(query, key, value, kwargs.get("dropout") or 0.0), kwargs["scaling"]
    if way == "row":
        out = _row_kernel(query, key, value, 0.0, True, attn_mask=bias.line, scale=scaling)[0]
        return out.transpose(1, 2).contiguous(), None
    if way == "mask":
        return stock(module, query, key, value, bias.mask(query.dtype), **kwargs)
    out, maps = stock(module, *folded_heads(query, key, value, bias, scaling), None, **kwargs | {"is_causal": True})
    return out[..., : value.shape[-1]], maps


def folded_heads(
    query: Tensor, key: Tensor, value: Tensor, bias: KeyBias, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `WIDER` more entries, in whose products the numbers are."""
    ones = query.new_zeros(WIDER)
    ones[:BIAS_PARTS].fill_(1)
    return _wider(query, ones), _wider(key, bias.folded(scaling, key.dtype)), _wider(value, value.new_zeros(WIDER))


def _wider(x: Tensor, more: Tensor) -> Tensor:
    return torch.cat([x, more.expand(*x.shape[:3], WIDER)], dim=-1)
