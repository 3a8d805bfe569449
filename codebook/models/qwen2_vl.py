"""Qwen2-VL and Qwen2.5-VL: images of any size, four patches merged into a token, videos in pairs of frames."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from codebook.models.any_size import AnySize
from codebook.models.base import Model


class Qwen2VL(AnySize):
    name = "qwen2_vl"
    clip_fps = 2.0
    axes: ClassVar[int] = 3
    reusable_prefix = False

    def tower(self, model: Model) -> nn.Module:
        return model.base_model.visual

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.visual.merger

    def tower_layers(self, model: Model) -> nn.ModuleList:
        return model.base_model.visual.blocks

    def attention_of(self, layer: Any) -> nn.Module:
        return layer.attn

    def pooled(self, model: Model, patches: Tensor, rows: int, cols: int) -> Tensor:
        # The tower takes the patches of a token one after the other.
        return patches.unflatten(0, (-1, self.merge(model) ** 2)).mean(1)

    def probe_arguments(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        rows, cols = grid
        after = start + max(grid) + torch.arange(embeds.shape[1] - start - rows * cols)
        down, across = (x.flatten() for x in torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"))
        image = start + torch.stack([torch.zeros_like(down), down, across])
        positions = torch.cat([torch.arange(start).expand(3, -1), image, after.expand(3, -1)], dim=1)
        return {"position_ids": positions[:, None].expand(-1, len(embeds), -1).to(embeds.device)}


class Qwen25VL(Qwen2VL):
    name = "qwen2_5_vl"

    def vision_attention(self, model: Model) -> nn.Module:
        # The last layer that attends to whole images; of the others, each token sees a window.
        return model.base_model.visual.blocks[max(model.config.vision_config.fullatt_block_indexes)].attn

    def pooled(self, model: Model, patches: Tensor, rows: int, cols: int) -> Tensor:
        from transformers.vision_utils import get_vision_window_index

        config = model.config.vision_config
        size = torch.tensor([[1, rows * config.spatial_merge_size, cols * config.spatial_merge_size]])
        index, _ = get_vision_window_index(size, config.spatial_merge_size, config.window_size, config.patch_size)
        return super().pooled(model, patches, rows, cols)[index.argsort().to(patches.device)]
