"""GLM-4.1V, GLM-4.5V and GLM-4.6V: Qwen2-VL whose videos have the images' token, with text between frames."""

from __future__ import annotations

from torch import nn

from codebook.models.base import Model, Turned
from codebook.models.qwen2_vl import Qwen2VL


class Glm4v(Qwen2VL):
    name = "glm4v"

    def token(self, model: Model, kind: str) -> int:
        return super().token(model, "image")

    def turned(self, model: Model, layer: nn.Module) -> Turned:
        return "halves" if "moe" in model.config.get_text_config().model_type else "pairs"


class Glm46v(Glm4v):
    name = "glm46v"


class Glmga(Glm4v):
    name = "glmga"
    since = "5.23"


class Glm4vMoe(Glm4v):
    name = "glm4v_moe"
