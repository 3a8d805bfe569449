"""LLaVA-OneVision: images as in LLaVA-NeXT, shrunk where their crops are many; the pooled frames of videos."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from codebook.models.base import Model
from codebook.models.encoded import Encoded
from codebook.models.llava_next_video import PooledFrames


class LlavaOnevision(PooledFrames):
    name = "llava_onevision"
    tail = 1  # a newline

    def frame_side(self, model: Model) -> int:
        return math.ceil(self.grid(model)[0] / 2)

    def pooled_frames(self, model: Model, frames: Tensor) -> Tensor:
        return model.base_model.apply_pooling(frames)

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
