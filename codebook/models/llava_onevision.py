"""LLaVA-OneVision: images as in LLaVA-NeXT, shrunk where their crops are many; the pooled frames of videos."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from codebook.models.base import Model
from codebook.models.encoded import Encoded
from codebook.models.layout import Layout, layouts_per_row
from codebook.models.llava_next import LlavaNext


class LlavaOnevision(LlavaNext):
    name = "llava_onevision"

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        if kind == "image":
            return super().layouts(model, kind, prompts, encoded)
        counts = [ids.count(self.token(model, kind)) for ids in prompts]
        if encoded is None:
            raise self.unseen_error(kind)
        videos, frames = encoded.given["pixel_values_videos"].shape[:2]
        side = math.ceil(self.grid(model)[0] / 2)
        return layouts_per_row(kind, [Layout.stacked(frames, side, side, "frame", tail=1)] * videos, counts)

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        if encoded.kind == "video":
            return list(encoded.given["pixel_values_videos"])
        return super().pixels(model, encoded)

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        if encoded.kind == "image":
            return super().pack(model, encoded, values)
        videos = encoded.given["pixel_values_videos"].shape[0]
        pooled = model.base_model.apply_pooling(torch.stack(values))
        pooled = pooled.reshape(videos, -1, pooled.shape[-1])
        return list(torch.cat([pooled, pooled.new_zeros(videos, 1, pooled.shape[-1])], dim=1))

    def crops(self, model: Model, encoded: Encoded) -> list[int]:
        crops, samples = super().crops(model, encoded), encoded.given.get("batch_num_images")
        if samples is None:
            return crops
        # Of several images in a sample only the whole views are encoded.
        alone = [count == 1 for count in samples.tolist() for _ in range(count)]
        return [count if single else 1 for count, single in zip(crops, alone, strict=True)]

    def _packing(self, model: Model, encoded: Encoded) -> dict[str, Any]:
        ratio = encoded.given.get("vision_aspect_ratio")
        return {"vision_aspect_ratio": ratio or model.config.vision_aspect_ratio}
