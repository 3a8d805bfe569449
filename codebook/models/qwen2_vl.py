"""Qwen2-VL and Qwen2.5-VL: images of any size, four patches merged to a token, videos in pairs of frames."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from codebook.models.base import Encoded, Family, Layout, dealt

SIDE = 24
"""Tokens a side of the images that a codebook is built from: 672 pixels at 14 a patch."""


class Qwen2VL(Family):
    name = "qwen2_vl"
    tower_rows = False
    axes: ClassVar[int] = 3

    def tower(self, model: Any) -> nn.Module:
        return model.base_model.visual

    def projector(self, model: Any) -> nn.Module:
        return model.base_model.visual.merger

    def vision_attention(self, model: Any) -> nn.Module:
        return model.base_model.visual.blocks[-1].attn

    def grid(self, model: Any) -> tuple[int, int]:
        return SIDE, SIDE

    def layouts(self, model: Any, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        counts = [ids.count(self.token(model, kind)) for ids in prompts]
        if encoded is None:
            raise self.unseen(kind)
        layouts = []
        for frames, rows, cols in self.sizes(model, encoded):
            layouts.append(Layout.stacked(frames, rows, cols, "view" if kind == "image" else "frame"))
        return dealt(kind, layouts, counts)

    def pixels(self, model: Any, encoded: Encoded) -> list[Tensor]:
        patches = [4 * frames * rows * cols for frames, rows, cols in self.sizes(model, encoded)]
        name = "pixel_values" if encoded.kind == "image" else "pixel_values_videos"
        return list(encoded.given[name].split(patches))

    def pack(self, model: Any, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        frames, out = iter(values), []
        for count, rows, cols in self.sizes(model, encoded):
            tokens = [next(frames).unflatten(0, (-1, 4)).mean(1) for _ in range(count)]
            order = self.order(model, rows, cols).to(tokens[0].device)
            out.append(torch.cat([frame[order] for frame in tokens]))
        return out

    def order(self, model: Any, rows: int, cols: int) -> Tensor:
        """(rows * cols,) int64: where the tower has the tokens of an image or frame, in raster order."""
        return torch.arange(rows * cols)

    def sizes(self, model: Any, encoded: Encoded) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of visual tokens of each image or video."""
        merge = model.config.vision_config.spatial_merge_size
        grids = encoded.given[f"{encoded.kind}_grid_thw"].tolist()
        return [(frames, height // merge, width // merge) for frames, height, width in grids]

    def image_features(self, model: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        raise NotImplementedError


class Qwen25VL(Qwen2VL):
    name = "qwen2_5_vl"

    def vision_attention(self, model: Any) -> nn.Module:
        # The last layer that attends to whole images; of the others, each token sees a window.
        return model.base_model.visual.blocks[max(model.config.vision_config.fullatt_block_indexes)].attn

    def order(self, model: Any, rows: int, cols: int) -> Tensor:
        from transformers.vision_utils import get_vision_window_index

        config = model.config.vision_config
        size = torch.tensor([[1, rows * config.spatial_merge_size, cols * config.spatial_merge_size]])
        index, _ = get_vision_window_index(size, config.spatial_merge_size, config.window_size, config.patch_size)
        return index.argsort()
