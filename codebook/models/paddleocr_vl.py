"""PaddleOCR-VL: Qwen2-VL's positions, and a SigLIP tower whose patches come line by line."""

from __future__ import annotations

from torch import nn

from codebook.models.any_size import AnySize
from codebook.models.base import Family, Model
from codebook.models.qwen2_vl import Qwen2VL


class PaddleOCRVL(Qwen2VL):
    name = "paddleocr_vl"
    since = "5.21"
    attention_of = Family.attention_of
    pooled = AnySize.pooled

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.projector

    def tower_layers(self, model: Model) -> nn.ModuleList:
        return model.base_model.visual.vision_model.encoder.layers
