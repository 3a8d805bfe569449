"""PaliGemma: a fixed number of visual tokens before the text, and a prompt whose tokens all see each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from codebook.models.base import Family, Model
from codebook.models.encoded import Encoded
from codebook.models.layout import Layout, fixed_layouts


class PaliGemma(Family):
    name = "paligemma"
    reusable_prefix = False
    window_last = False

    def vision_attention(self, model: Model) -> nn.Module:
        return model.base_model.vision_tower.encoder.layers[-1].self_attn

    def grid(self, model: Model) -> tuple[int, int]:
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        return side, side

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        return fixed_layouts(self.grid(model), prompts, self.token(model, kind))

    def blocks(self, model: Model, given: dict[str, Any]) -> Tensor | None:
        types, cache = given.get("token_type_ids"), given.get("past_key_values")
        started = cache is not None and cache.is_initialized and given.get("pixel_values") is None
        return None if types is None or started else torch.where(types == 0, 0, -1)

    def probe_arguments(self, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        return {"token_type_ids": torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)}

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        out = model.base_model.get_image_features(pixel_values=pixel_values, return_dict=True)
        return out.pooler_output, out.last_hidden_state, None
