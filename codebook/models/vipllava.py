"""VipLLaVA: LLaVA-1.5 whose projector gets several layers of the tower at once."""

from __future__ import annotations

from typing import Any

from codebook.errors import CodebookError
from codebook.models.base import Family, Model
from codebook.models.llava import Llava


class VipLlava(Llava):
    name = "vipllava"
    since = "5.23"

    def check(self, config: Any) -> Family:
        tower = config.vision_config.model_type
        if tower != "clip_vision_model":
            raise CodebookError(f"vipllava with a {tower} tower is not supported; use clip_vision_model")
        return self

    def has_cls(self, model: Model) -> bool:
        return True
