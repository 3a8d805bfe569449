"""DeepSeek-VL: SigLIP tower and a fixed number of visual tokens per image."""

from __future__ import annotations

from torch import nn

from codebook.models.base import Family, Model


class DeepseekVL(Family):
    name = "deepseek_vl"

    def tower(self, model: Model) -> nn.Module:
        return model.base_model.vision_model

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.aligner
