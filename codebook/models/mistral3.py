"""Mistral 3: images of any size through Pixtral, squares of patches merged, rows ended by tokens of text."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image as Picture
from torch import Tensor, nn

from codebook.models import any_size
from codebook.models.any_size import AnySize
from codebook.models.base import Model, Processor
from codebook.models.encoded import Encoded


class Mistral3(AnySize):
    name = "mistral3"

    def tower_layers(self, model: Model) -> nn.ModuleList:
        return model.base_model.vision_tower.transformer.layers

    def attention_of(self, layer: Any) -> nn.Module:
        return layer.attention

    def merge(self, model: Model) -> int:
        return int(model.config.spatial_merge_size)

    def sizes(self, model: Model, encoded: Encoded) -> list[tuple[int, int, int]]:
        side = model.config.vision_config.patch_size * self.merge(model)
        return [(1, height // side, width // side) for height, width in _heights_and_widths(encoded)]

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        images = zip(encoded.given["pixel_values"], _heights_and_widths(encoded), strict=True)
        return [image[:, :height, :width] for image, (height, width) in images]  # without padding

    def attended(self, model: Model, encoded: Encoded) -> list[tuple[int, slice]]:
        # All images are one row, in which each attends to itself.
        out, start = [], 0
        for _, rows, cols in self.sizes(model, encoded):
            stop = start + rows * cols * self.merge(model) ** 2
            out.append((0, slice(start, stop)))
            start = stop
        return out

    def view(self, processor: Processor, picture: Picture.Image) -> Tensor:
        side = any_size.VIEW_SIDE * processor.spatial_merge_size * processor.patch_size
        return processor.image_processor(
            images=picture.resize((side, side)), patch_size=processor.patch_size, return_tensors="pt"
        )["pixel_values"]

    def view_arguments(self, model: Model, pixel_values: Tensor) -> dict[str, Any]:
        return {"image_sizes": torch.tensor([pixel_values.shape[-2:]] * len(pixel_values))}


def _heights_and_widths(encoded: Encoded) -> list[tuple[int, int]]:
    """Pixels of each image, without padding."""
    return [(int(height), int(width)) for height, width in encoded.given["image_sizes"]]
