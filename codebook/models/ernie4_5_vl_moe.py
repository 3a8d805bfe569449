"""ERNIE 4.5 VL: Qwen2-VL whose frames are merged in pairs after the tower, with experts of their own for images."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from codebook.models.base import Model, Turned
from codebook.models.encoded import Encoded
from codebook.models.qwen2_vl import Qwen2VL


class Ernie45VLMoe(Qwen2VL):
    name = "ernie4_5_vl_moe"
    per_token: ClassVar[tuple[str, ...]] = ("moe_mm_token_type_ids",)

    def tower(self, model: Model) -> nn.Module:
        return model.base_model.vision_tower

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.resampler_model

    def tower_layers(self, model: Model) -> nn.ModuleList:
        return model.base_model.vision_tower.blocks

    def turned(self, model: Model, layer: nn.Module) -> Turned:
        return "pairs"

    def sizes(self, model: Model, encoded: Encoded) -> list[tuple[int, int, int]]:
        pair = 1 if encoded.kind == "image" else model.config.vision_config.temporal_merge_size
        return [(frames // pair, rows, cols) for frames, rows, cols in super().sizes(model, encoded)]

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        if encoded.kind == "video":
            pair = model.config.vision_config.temporal_merge_size
            values = [torch.stack(values[i : i + pair]).mean(0) for i in range(0, len(values), pair)]
        return super().pack(model, encoded, values)

    def probe_arguments(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        types = torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        types[:, max(0, start - 1) : start + grid[0] * grid[1] + 1] = 1  # with the tokens that begin and end an image
        return super().probe_arguments(model, embeds, start, grid) | {"moe_mm_token_type_ids": types}
