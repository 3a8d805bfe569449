"""Llama 4: crops of an image, then its whole view; attention in chunks, and in every fourth layer without positions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from PIL import Image as Picture
from torch import Tensor, nn

from codebook.models.base import Family, Model, Processor, Turned
from codebook.models.encoded import Encoded
from codebook.models.layout import Layout, tagged_layouts


class Llama4(Family):
    name = "llama4"
    since = "5.23"
    chunked = True
    one_view: ClassVar[dict[str, Any]] = {"max_patches": 1}

    def tower(self, model: Model) -> nn.Module:
        return model.vision_model

    def projector(self, model: Model) -> nn.Module:
        return model.multi_modal_projector

    def tower_layers(self, model: Model) -> nn.ModuleList:
        return model.vision_model.model.layers

    def has_cls(self, model: Model) -> bool:
        return True

    def attended(self, model: Model, encoded: Encoded) -> list[tuple[int, list[int]]]:
        rows, cols = self.patches(model)
        order = [rows * cols, *range(rows * cols)]  # [CLS] stands behind the patches
        return [(row, order) for row in range(len(encoded.given["pixel_values"]))]

    def merge(self, model: Model) -> int:
        return round(1 / model.config.vision_config.pixel_shuffle_ratio)

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        return [tagged_layouts(ids, self.token(model, kind), self.grid(model)) for ids in prompts]

    def view(self, processor: Processor, picture: Picture.Image) -> Tensor:
        images = processor.image_processor
        side = images.size["height"]  # another shape would be padded to a square
        return images(images=picture.resize((side, side)), return_tensors="pt", **self.one_view)["pixel_values"]

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        out = model.vision_model(pixel_values, output_hidden_states=True, return_dict=True)
        hidden, call = out.hidden_states[-1], Encoded("image", {"pixel_values": pixel_values})
        patches = torch.stack(self.pack(model, call, list(hidden[:, :-1])))
        return model.multi_modal_projector(out.last_hidden_state), patches, hidden[:, -1]

    def longest(self, model: Model) -> int | None:
        # Layers without positions scale queries by where they stand among those that they are given.
        text = model.config.get_text_config()
        return text.floor_scale - 1 if text.attn_temperature_tuning and 0 in text.no_rope_layers else None

    def rotary(self, given: Any) -> tuple[Tensor, Tensor]:
        return given.real.repeat_interleave(2, -1), given.imag.repeat_interleave(2, -1)

    def rotary_given(self, cos: Tensor, sin: Tensor) -> Any:
        return torch.complex(cos[..., ::2].contiguous(), sin[..., ::2].contiguous())

    def turned(self, model: Model, layer: Any) -> Turned:
        return "pairs" if layer.self_attn.use_rope else "nothing"
