"""Idefics3 and SmolVLM: crops of an image, with text that names their places between them, then its whole view."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from codebook.models.base import Family, Model
from codebook.models.encoded import Encoded
from codebook.models.layout import Layout, tagged_layouts


class Idefics3(Family):
    name = "idefics3"
    tower_rows = False
    one_view: ClassVar[dict[str, Any]] = {"do_image_splitting": False}

    def tower(self, model: Model) -> nn.Module:
        return model.base_model.vision_model

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.connector

    def merge(self, model: Model) -> int:
        return int(model.config.scale_factor)

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        return [tagged_layouts(ids, self.token(model, kind), self.grid(model), rows_known=True) for ids in prompts]

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        pixels = encoded.given["pixel_values"].flatten(0, 1)
        return list(pixels[pixels.flatten(1).any(1)])  # the model too drops crops that are all zero: padding

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        crops = pixel_values if pixel_values.dim() == 5 else pixel_values[:, None]
        return super().image_features(model, crops[:, -1:])


class SmolVLM(Idefics3):
    name = "smolvlm"
