"""Aya Vision and Cohere2 Vision: crops of an image, then its whole view, each of them shuffled to fewer tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from codebook.models.base import Family, Model, Turned
from codebook.models.encoded import Encoded
from codebook.models.layout import Layout, broken_layouts, tagged_layouts
from codebook.models.llava import Llava


class AyaVision(Llava):
    name = "aya_vision"
    one_view: ClassVar[dict[str, Any]] = {"crop_to_patches": False}
    shown_box = Family.shown_box
    encode = Family.encode

    def merge(self, model: Model) -> int:
        return int(model.config.downsample_factor)

    def turned(self, model: Model, layer: Any) -> Turned:
        # In Cohere 2, layers without a sliding window have no positions at all.
        return "pairs" if getattr(layer.self_attn, "sliding_window", True) else "nothing"

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        return [tagged_layouts(ids, self.token(model, kind), self.grid(model)) for ids in prompts]


class Cohere2Vision(AyaVision):
    name = "cohere2_vision"
    check = Family.check

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        return [broken_layouts(ids, self.token(model, kind), self.grid(model)) for ids in prompts]
