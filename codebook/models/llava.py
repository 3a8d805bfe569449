"""LLaVA-1.5: CLIP or SigLIP tower, MLP projector, a fixed number of visual tokens per image."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from codebook.errors import CodebookError
from codebook.models.base import Family, Model, Processor
from codebook.models.layout import WHOLE_PICTURE

STRATEGY = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""Select strategy that leaves exactly the grid of patches, by type of tower."""


class Llava(Family):
    name = "llava"

    def check(self, config: Any) -> Family:
        tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if STRATEGY.get(tower) != strategy:
            known = ", ".join(f"{name} with {value!r}" for name, value in STRATEGY.items())
            raise CodebookError(
                f"{self.name} with a {tower} tower and {strategy!r} features is not supported; use {known}"
            )
        return self

    def shown_box(self, processor: Processor, size: tuple[int, int]) -> tuple[float, float, float, float]:
        made = processor.image_processor
        edge = made.size.get("shortest_edge")
        if not (edge and getattr(made, "do_resize", False) and getattr(made, "do_center_crop", False)):
            return WHOLE_PICTURE
        # CLIP's own way: the shorter side is scaled to `edge`, and the middle is cut out.
        width, height = (length * edge / min(size) for length in size)
        left, top = (1 - made.crop_size["width"] / width) / 2, (1 - made.crop_size["height"] / height) / 2
        return left, top, 1 - left, 1 - top

    def encode(self, model: Model, pixels: Tensor, rows: int, cols: int) -> Tensor:
        patch = model.config.vision_config.patch_size
        size = (rows * patch, cols * patch)
        resized = interpolate(pixels[None].float(), size, mode="bicubic", antialias=True).to(pixels.dtype)
        out = model.base_model.get_image_features(pixel_values=resized, interpolate_pos_encoding=True, return_dict=True)
        return out.pooler_output[0]
