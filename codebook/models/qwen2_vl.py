"""Qwen2-VL and Qwen2.5-VL: images of any size, four patches merged into a token, videos in pairs of frames."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from codebook.models.base import Family, Model, Processor
from codebook.models.encoded import Encoded
from codebook.models.layout import Layout, layouts_per_row

VIEW_SIDE = 24
"""Visual tokens per side of the images that a codebook is built from, stretched to a square (672 pixels with patches
of 14)."""


class Qwen2VL(Family):
    name = "qwen2_vl"
    clip_fps = 2.0
    tower_rows = False
    axes: ClassVar[int] = 3
    reusable_prefix = False

    def tower(self, model: Model) -> nn.Module:
        return model.base_model.visual

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.visual.merger

    def vision_attention(self, model: Model) -> nn.Module:
        return model.base_model.visual.blocks[-1].attn

    def grid(self, model: Model) -> tuple[int, int]:
        return VIEW_SIDE, VIEW_SIDE

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        counts = [ids.count(self.token(model, kind)) for ids in prompts]
        if encoded is None:
            raise self.unseen_error(kind)
        layouts = []
        for frames, rows, cols in self.sizes(model, encoded):
            layouts.append(Layout.stacked(frames, rows, cols, "view" if kind == "image" else "frame"))
        return layouts_per_row(kind, layouts, counts)

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        patches = [4 * frames * rows * cols for frames, rows, cols in self.sizes(model, encoded)]
        name = "pixel_values" if encoded.kind == "image" else "pixel_values_videos"
        return list(encoded.given[name].split(patches))

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        frames, out = iter(values), []
        for count, rows, cols in self.sizes(model, encoded):
            tokens = [next(frames).unflatten(0, (-1, 4)).mean(1) for _ in range(count)]
            order = self.order(model, rows, cols).to(tokens[0].device)
            out.append(torch.cat([frame[order] for frame in tokens]))
        return out

    def order(self, model: Model, rows: int, cols: int) -> Tensor:
        """(rows * cols,) int64: for each token of an image in raster order, its place in the tower's output."""
        return torch.arange(rows * cols)

    def sizes(self, model: Model, encoded: Encoded) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of visual tokens of each image or video."""
        merge = model.config.vision_config.spatial_merge_size
        grids = encoded.given[f"{encoded.kind}_grid_thw"].tolist()
        return [(frames, height // merge, width // merge) for frames, height, width in grids]

    def view(self, processor: Processor, picture: Any) -> Tensor:
        images = processor.image_processor
        side = VIEW_SIDE * images.merge_size * images.patch_size
        return images(images=picture.resize((side, side)), return_tensors="pt")["pixel_values"]

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        out, call = self._encode(model, pixel_values)
        values = list(out.last_hidden_state.split(4 * VIEW_SIDE * VIEW_SIDE))
        return torch.stack(list(out.pooler_output)), torch.stack(self.pack(model, call, values)), None

    def probe_arguments(self, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        rows, cols = grid
        after = start + max(grid) + torch.arange(embeds.shape[1] - start - rows * cols)
        down, across = (x.flatten() for x in torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"))
        image = start + torch.stack([torch.zeros_like(down), down, across])
        positions = torch.cat([torch.arange(start).expand(3, -1), image, after.expand(3, -1)], dim=1)
        return {"position_ids": positions[:, None].expand(-1, len(embeds), -1).to(embeds.device)}

    def _encode(self, model: Model, pixel_values: Tensor) -> tuple[Any, Encoded]:
        merge = model.config.vision_config.spatial_merge_size
        size = torch.tensor([[1, merge * VIEW_SIDE, merge * VIEW_SIDE]], device=pixel_values.device)
        count = len(pixel_values) // (2 * VIEW_SIDE) ** 2
        given = {"pixel_values": pixel_values, "image_grid_thw": size.repeat(count, 1)}
        return model.base_model.get_image_features(**given, return_dict=True), Encoded("image", given)


class Qwen25VL(Qwen2VL):
    name = "qwen2_5_vl"

    def vision_attention(self, model: Model) -> nn.Module:
        # The last layer that attends to whole images; of the others, each token sees a window.
        return model.base_model.visual.blocks[max(model.config.vision_config.fullatt_block_indexes)].attn

    def order(self, model: Model, rows: int, cols: int) -> Tensor:
        from transformers.vision_utils import get_vision_window_index

        config = model.config.vision_config
        size = torch.tensor([[1, rows * config.spatial_merge_size, cols * config.spatial_merge_size]])
        index, _ = get_vision_window_index(size, config.spatial_merge_size, config.window_size, config.patch_size)
        return index.argsort()
