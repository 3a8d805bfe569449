"""The sizes of a model that budgets and costs are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from codebook.errors import CodebookError
from codebook.models.base import Model, decoder
from codebook.models.registry import family
from codebook.models.wrappers import stock

RECURRENT = ("linear_attn", "conv")
"""Names of the part of a decoder layer that carries a state, where it has one in place of attention."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's decoder, and how many visual tokens it is given.

    Attributes
    ----------
    tokens
        Visual tokens of an image's whole view: the grid that a codebook is built from.
    layers
        Decoder layers.
    attending
        Which of them have attention, and so a KV cache: all but recurrent ones, and those that use another's.
    reusing
        Those that use another's: `generate` runs them on the last token of a prompt alone.
    stages
        How many layers, from the first on, stages can be at: all, but behind one whose keys later layers use, these
        would go on to see what it saw.
    hidden, intermediate
        Width of the hidden states, and of the MLP inside a layer; of a mixture of experts, of those that a token sees.
    heads, kv_heads
        Attention heads of queries, and of keys and values.
    head_size
        Width of one head; where layers differ, such that all keys and values take as much memory as they do.
    """

    tokens: int
    layers: int
    attending: frozenset[int]
    reusing: frozenset[int]
    stages: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int


def shape(model: Model) -> Shape:
    """The sizes of a loaded model.

    Raises
    ------
    CodebookError
        If its family is not supported.
    """
    model = stock(model)
    found = family(model)
    keys = found.keys_layers(model)
    reusing = frozenset(i for i, own in enumerate(keys) if own != i)
    rows, cols = found.grid(model)
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    layers = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]
    kept = [_kv_heads(layer, heads) for layer in layers]
    sizes = [getattr(layer, "head_dim", None) or text.hidden_size // heads for layer in layers]
    width = sum(a * b for a, b in zip(kept, sizes, strict=True)) / len(layers)
    if latent := getattr(text, "kv_lora_rank", None):  # one head, of which keys and values are made anew
        kept, width = [1], (latent + text.qk_rope_head_dim) / 2
    return Shape(
        tokens=rows * cols,
        layers=text.num_hidden_layers,
        attending=frozenset(
            i for i, layer in enumerate(decoder(model).layers) if not is_recurrent(layer) and i not in reusing
        ),
        reusing=reusing,
        stages=min((keys[i] + 1 for i in reusing), default=len(keys)),
        hidden=text.hidden_size,
        intermediate=_mlp(text),
        heads=heads,
        kv_heads=kept[0],
        head_size=round(width / kept[0]),
    )


def _kv_heads(config: Any, heads: int) -> int:
    """Heads of keys and values of a decoder layer."""
    return getattr(config, "num_key_value_heads", None) or heads


def _mlp(text: Any) -> int:
    if wide := getattr(text, "intermediate_size_mlp", None):  # of Llama 4, as wide as an expert and the shared one
        return wide
    expert = getattr(text, "moe_intermediate_size", None)
    if not expert:
        return text.intermediate_size
    if getattr(text, "top_k_experts", None):  # of Gemma 4, beside the usual MLP
        return text.top_k_experts * expert + text.intermediate_size
    own, expert = (expert[1], expert[0]) if isinstance(expert, list) else (expert, expert)  # of images, of text
    number = getattr(text, "n_shared_experts", None) or getattr(text, "moe_num_shared_experts", None) or 0
    shared = getattr(text, "shared_expert_intermediate_size", None) or number * expert
    return text.num_experts_per_tok * own + shared


def is_recurrent(layer: Any) -> bool:
    """Whether a decoder layer carries a state from token to token: linear attention or a convolution.

    Such a layer caches no keys and values of single tokens, and no mask can hide a token from it. Shown a shorter
    sequence, it never hears of what was dropped.

    Raises
    ------
    CodebookError
        If the layer is neither this nor attention.
    """
    if hasattr(layer, "self_attn"):
        return False
    if not any(hasattr(layer, name) for name in RECURRENT):
        raise CodebookError(
            f"a {type(layer).__name__} of the decoder has neither attention nor a recurrent part that is known here: "
            "use a model with full attention, such as qwen3_vl"
        )
    return True
