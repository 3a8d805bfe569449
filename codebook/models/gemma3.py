"""Gemma 3: SigLIP features pooled to a fixed number of tokens per image, which see each other in both directions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from codebook.models.base import Family, Model
from codebook.models.encoded import Encoded
from codebook.models.layout import Layout, fixed_layouts, pool_patches


class Gemma3(Family):
    name = "gemma3"
    reusable_prefix = False

    def vision_attention(self, model: Model) -> nn.Module:
        return model.base_model.vision_tower.encoder.layers[-1].self_attn

    def grid(self, model: Model) -> tuple[int, int]:
        side = math.isqrt(model.config.mm_tokens_per_image)
        return side, side

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        return fixed_layouts(self.grid(model), prompts, self.token(model, kind))

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        return [pool_patches(patches, side, side // self.grid(model)[0]) for patches in values]

    def blocks(self, model: Model, given: dict[str, Any]) -> Tensor | None:
        types = given.get("token_type_ids")
        if types is None:
            return None
        image = types == 1
        first = image & ~nn.functional.pad(image, (1, 0))[:, :-1]
        return torch.where(image, first.cumsum(1) - 1, -1)

    def rotary(self, model: Model, embeds: Tensor, positions: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
        attention: Any = layer.self_attn
        return model.get_decoder().rotary_emb(embeds, positions, attention.layer_type)

    def probe_arguments(self, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        types = torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        types[:, start : start + grid[0] * grid[1]] = 1
        return {"token_type_ids": types}

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        out = model.base_model.get_image_features(pixel_values=pixel_values, return_dict=True)
        call = Encoded("image", {"pixel_values": pixel_values})
        return out.pooler_output, torch.stack(self.pack(model, call, list(out.last_hidden_state))), None
