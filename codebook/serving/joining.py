"""Prompts that were processed one by one as one batch, as if the processor had made them together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import BatchFeature

from codebook.inference.prompts import Prompts

FILLERS = {
    "input_ids": None,
    "attention_mask": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "moe_mm_token_type_ids": 0,
}
"""Inputs with one number per token, and what stands in padding; None: the padding token."""
PER_IMAGE = {
    "pixel_values",
    "pixel_attention_mask",
    "image_sizes",
    "image_grid_thw",
    "batch_num_images",
    "spatial_shapes",
    "image_position_ids",
    "target_sizes",
}
"""Inputs of which one prompt's rows simply follow another's."""

SIZES_IN_A_ROW = "target_sizes"
"""The input of a model whose pixels are one row: there, one prompt's follow another's along the last dimension."""

LONGEST_TO_SHORTEST = 1.5
"""Ratio of the lengths in a batch: on a CPU the padding of prompts that differ more costs more than company saves."""


def alike(first: Prompts, other: Prompts) -> bool:
    """Whether two prompts can share a batch: the same inputs, all known, of one shape per image; and like lengths."""
    if first.inputs.keys() != other.inputs.keys() or not first.inputs.keys() <= FILLERS.keys() | PER_IMAGE:
        return False
    lengths = sorted(one.inputs["input_ids"].shape[1] for one in (first, other))
    images = PER_IMAGE & first.inputs.keys()
    return lengths[1] <= LONGEST_TO_SHORTEST * lengths[0] and all(
        first.inputs[name].shape[1:] == other.inputs[name].shape[1:] for name in images
    )


def join(prompts: Sequence[Prompts], pad_token: int) -> Prompts:
    """One batch of prompts that are alike, padded on the left."""
    if len(prompts) == 1:
        return prompts[0]
    joined: dict[str, Tensor] = {}
    for name in prompts[0].inputs:
        parts = [one.inputs[name] for one in prompts]
        if name in FILLERS:
            filler = FILLERS[name] if name != "input_ids" else pad_token
            longest = max(part.shape[1] for part in parts)
            parts = [pad(part, (longest - part.shape[1], 0), value=filler) for part in parts]
        along = -1 if name == "pixel_values" and SIZES_IN_A_ROW in prompts[0].inputs else 0
        joined[name] = torch.cat(parts, along)
    return Prompts(BatchFeature(joined), [count for one in prompts for count in one.images])
