"""Kimi K2.5: images of any size through MoonViT, four patches merged into a token; latent attention in the decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from codebook.errors import CodebookError
from codebook.models.any_size import AnySize
from codebook.models.base import Model, Turned
from codebook.models.encoded import Encoded
from codebook.models.layout import Layout


class KimiK25(AnySize):
    name = "kimi_k25"

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.mm_projector

    def tower_layers(self, model: Model) -> nn.ModuleList:
        return model.base_model.vision_tower.layers

    def attention_of(self, layer: Any) -> nn.Module:
        return layer.attn

    def merge(self, model: Model) -> int:
        return int(model.config.vision_config.merge_kernel_size[0])

    def turned(self, model: Model, layer: nn.Module) -> Turned:
        return "other"

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        if kind == "video":
            raise CodebookError("videos of kimi_k25 are not supported, whose frames are averaged: use images of them")
        return super().layouts(model, kind, prompts, encoded)
