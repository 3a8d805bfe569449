"""The sizes of a model that budgets and costs are computed from."""

from __future__ import annotations

from dataclasses import dataclass

from codebook.models.base import Model
from codebook.models.registry import family
from codebook.models.wrappers import stock


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's decoder, and how many visual tokens it is given.

    Attributes
    ----------
    tokens
        Visual tokens of an image's whole view: the grid that a codebook is built from.
    layers
        Decoder layers.
    hidden, intermediate
        Width of the hidden states, and of the MLP inside a layer.
    heads, kv_heads
        Attention heads of queries, and of keys and values.
    head_size
        Width of one head.
    """

    tokens: int
    layers: int
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
    rows, cols = family(model).grid(model)
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    return Shape(
        tokens=rows * cols,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
    )
