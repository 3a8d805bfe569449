"""LFM2-VL: images of any size, squares of patches merged into tokens; crops are images of their own, with text between.

Its decoder is of short convolutions for the most part, and so is LFM3-VL's, which has Qwen2-VL's grids.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from PIL import Image as Picture
from torch import Tensor, nn

from codebook.errors import CodebookError
from codebook.models.any_size import AnySize
from codebook.models.base import Family, Model, Processor
from codebook.models.encoded import Encoded
from codebook.models.qwen2_vl import Qwen2VL

VIEW_TOKENS = 16
"""Visual tokens per side of the images that a codebook is built from, stretched to a square (512 pixels with patches
of 16, the most that the processor leaves whole)."""


class Lfm2Decoder(Family):
    """A family whose decoder is LFM2's, which has names of its own for its normalisations."""

    def last_norm(self, model: Model) -> nn.Module:
        return model.get_decoder().embedding_norm

    def attention_norm(self, layer: Any) -> nn.Module:
        return layer.operator_norm


class Lfm2VL(Lfm2Decoder, AnySize):
    name = "lfm2_vl"
    reusable_prefix = False
    one_view: ClassVar[dict[str, Any]] = {"do_image_splitting": False}

    def check(self, config: Any) -> Family:
        if config.text_config.conv_bias:
            raise CodebookError(f"{self.name} with conv_bias lets padding leak into its state: use one without")
        return self

    def merge(self, model: Model) -> int:
        return int(model.config.downsample_factor)

    def grid(self, model: Model) -> tuple[int, int]:
        return VIEW_TOKENS, VIEW_TOKENS

    def sizes(self, model: Model, encoded: Encoded) -> list[tuple[int, int, int]]:
        merge = self.merge(model)
        return [(1, rows // merge, cols // merge) for rows, cols in encoded.given["spatial_shapes"].tolist()]

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        return [encoded.given["pixel_values"][row, own] for row, own in self.attended(model, encoded)]

    def attended(self, model: Model, encoded: Encoded) -> list[tuple[int, slice]]:
        return [(row, slice(count)) for row, count in enumerate(encoded.given["spatial_shapes"].prod(-1).tolist())]

    def view(self, processor: Processor, picture: Picture.Image) -> Tensor:
        images = processor.image_processor
        side = VIEW_TOKENS * images.downsample_factor
        size = (side * images.encoder_patch_size,) * 2
        made = images(images=picture.resize(size), return_tensors="pt", **self.one_view)
        if made["spatial_shapes"].tolist() != [[side, side]]:
            raise CodebookError(
                f"the processor makes other sizes of a picture of {size[0]} x {size[1]} pixels: let it keep them, by "
                f"max_image_tokens of at least {VIEW_TOKENS**2}"
            )
        return made["pixel_values"]

    def view_arguments(self, model: Model, pixel_values: Tensor) -> dict[str, Any]:
        count, side, device = len(pixel_values), VIEW_TOKENS * self.merge(model), pixel_values.device
        return {
            "spatial_shapes": torch.full((count, 2), side, device=device),
            "pixel_attention_mask": torch.ones(count, side**2, dtype=torch.long, device=device),
        }

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        patches = (VIEW_TOKENS * self.merge(model)) ** 2
        return super().image_features(model, pixel_values[:, :patches])  # what follows is padding


class Lfm3VL(Lfm2Decoder, Qwen2VL):
    name = "lfm3_vl"
    since = "5.23"
    axes = 1

    def tower(self, model: Model) -> nn.Module:
        return model.base_model.vision_tower

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.multi_modal_projector

    def vision_attention(self, model: Model) -> nn.Module:
        layers: Any = self.tower(model).layers  # attention and convolutions
        return next(layer.self_attn for layer in reversed(layers) if hasattr(layer, "self_attn"))

    def probe_arguments(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        return {}
