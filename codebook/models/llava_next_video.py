"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, and the pooled frames of videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codebook.errors import CodebookError
from codebook.models.base import Family, Model
from codebook.models.encoded import Encoded
from codebook.models.layout import Layout, layouts_per_row, pool_patches
from codebook.models.llava_next import LlavaNext


class PooledFrames(LlavaNext):
    """Families of LLaVA-NeXT's kin with videos: the pooled frames of each, and then perhaps structural tokens."""

    tail = 0
    """Structural tokens at the end of a video."""

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        if encoded is None or kind == "image":
            return super().layouts(model, kind, prompts, encoded)
        videos, frames = encoded.given["pixel_values_videos"].shape[:2]
        side, token = self.frame_side(model), self.token(model, kind)
        layout = Layout.stacked(frames, side, side, "frame", self.tail)
        return layouts_per_row(kind, [layout] * videos, [ids.count(token) for ids in prompts])

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        if encoded.kind == "video":
            return list(encoded.given["pixel_values_videos"])
        return super().pixels(model, encoded)

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        if encoded.kind == "image":
            return super().pack(model, encoded, values)
        videos = encoded.given["pixel_values_videos"].shape[0]
        frames = self.pooled_frames(model, torch.stack(values))
        frames = frames.reshape(videos, -1, frames.shape[-1])
        return list(torch.cat([frames, frames.new_zeros(videos, self.tail, frames.shape[-1])], dim=1))

    def frame_side(self, model: Model) -> int:
        """Rows, and columns, of a frame's tokens."""
        return self.grid(model)[0] // int(model.config.spatial_pool_stride)

    def pooled_frames(self, model: Model, frames: Tensor) -> Tensor:
        """(frames, n, D) of (frames, N, D): the average of each token's patches."""
        return torch.stack([pool_patches(f, self.grid(model)[1], model.config.spatial_pool_stride) for f in frames])


class LlavaNextVideo(PooledFrames):
    name = "llava_next_video"

    def check(self, config: Any) -> Family:
        side, stride = config.vision_config.image_size // config.vision_config.patch_size, config.spatial_pool_stride
        if side % stride:
            raise CodebookError(
                f"frames of {side} x {side} patches, pooled by {stride}, are not supported; use llava_next"
            )
        return super().check(config)
