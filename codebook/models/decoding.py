"""The test of a decoder that no file describes: whether pruning's way of shortening its sequence is exact there."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from codebook.models.base import CACHE_NAMES, Model, rotary_at, window
from codebook.models.generic import Unproven

ODD_SETTINGS = {
    "attention_chunk_size": "attention in chunks",
    "num_kv_shared_layers": "layers that share keys and values",
    "hidden_size_per_layer_input": "inputs of its own in each layer",
}
"""Settings of a decoder's config that say what pruning cannot follow."""

VISIBLE_MASKS = ("sdpa", "eager")
"""Attention kernels that show what their masks are."""

SHORTENED = {"attention_mask", "position_embeddings", "position_ids", "cache_position", *CACHE_NAMES}
"""Arguments of layers, per token, that pruning shortens or makes anew."""


def position_axes(model: Model, inputs: dict[str, Any]) -> int:
    """The axes of a decoder's positions, if it is plain: 1, or 3 where its rotary embeddings have three.

    Each layer takes what the layer before it put out, sees what came before in the prompt, all of it or in a sliding
    window, and is given per token nothing but rotary embeddings and a mask.

    Parameters
    ----------
    inputs
        The model's inputs of one prompt with a picture.

    Raises
    ------
    Unproven
        If the decoder is not plain.
    """
    decoder, text = model.get_decoder(), model.config.get_text_config()
    for name, what in ODD_SETTINGS.items():
        if getattr(text, name, None):
            raise Unproven(f"its decoder has {what}")
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList) and not all(hasattr(layer, "self_attn") for layer in layers):
        raise Unproven("its decoder has layers without attention")
    if not isinstance(layers, nn.ModuleList) or not hasattr(decoder, "norm"):
        raise Unproven("its decoder is no list of layers with a normalisation behind it")
    if (kernel := decoder.config._attn_implementation) not in VISIBLE_MASKS:
        raise Unproven(f"attention {kernel!r} does not show its masks, load it with attn_implementation='sdpa'")
    watch = _Watch(model)
    with contextlib.ExitStack() as undo:
        for layer in decoder.layers:
            undo.callback(layer.register_forward_pre_hook(watch.before, with_kwargs=True).remove)
            undo.callback(layer.register_forward_hook(watch.after).remove)
        model(**inputs)
    if watch.layers != len(decoder.layers):
        raise Unproven(f"{watch.layers} layers ran where its decoder has {len(decoder.layers)}")
    return watch.axes


class _Watch:
    """Hooks that watch the layers of a decoder in one forward."""

    def __init__(self, model: Model) -> None:
        self.model, self.layers, self.axes = model, 0, 1
        self.last: Tensor | None = None

    def before(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].dim() != 3:
            raise Unproven("its decoder's layers are given more than hidden states by position")
        [hidden] = args
        if self.last is not None and not torch.equal(hidden, self.last):
            raise Unproven("something is added to hidden states between its decoder's layers")
        length = hidden.shape[1]
        for name, value in kwargs.items():
            if name not in SHORTENED and any(length in part.shape for part in _tensors(value)):
                raise Unproven(f"its decoder's layers are given {name} for each token")
        rotary = kwargs.get("position_embeddings")
        if not isinstance(rotary, tuple) or len(rotary) != 2 or any(part.shape[-2] != length for part in rotary):
            raise Unproven("its decoder's layers are given no rotary embeddings")
        self._check_mask(layer, kwargs.get("attention_mask"), length)
        self._count_axes(layer, hidden, kwargs)
        self.layers += 1

    def after(self, _: Any, args: Any, output: Any) -> None:
        self.last = output[0] if isinstance(output, tuple) else output

    def _check_mask(self, layer: Any, mask: Any, length: int) -> None:
        places = torch.arange(length)
        distance = places[:, None] - places
        expected = distance >= 0
        if (width := window(layer)) is not None:
            expected &= distance < width
        if mask is None:
            seen = distance >= 0
            if getattr(layer.self_attn, "is_causal", True) is False:
                seen = torch.ones_like(seen)
        elif isinstance(mask, Tensor) and mask.shape[-2:] == (length, length):
            seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[0, 0].cpu()
        else:
            raise Unproven("its decoder's layers are given masks of another kind")
        if not torch.equal(seen, expected):
            raise Unproven("tokens of its prompts do not see just those before them")

    def _count_axes(self, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() == 2:
            own = rotary_at(self.model.get_decoder().rotary_emb, hidden, positions, layer)
            if all(torch.equal(a, b) for a, b in zip(own, kwargs["position_embeddings"], strict=True)):
                return
        self.axes = 3


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in an argument."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [part for one in value for part in _tensors(one)] if isinstance(value, tuple | list) else []
