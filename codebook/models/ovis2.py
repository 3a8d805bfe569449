"""Ovis2: a visual token is a mixture of a table's rows, and so are the tokens that begin, part and end an image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from codebook.errors import CodebookError
from codebook.models.base import Family, Model
from codebook.models.encoded import Encoded
from codebook.models.layout import Layout, broken_layouts


class Ovis2(Family):
    name = "ovis2"
    one_view: ClassVar[dict[str, Any]] = {"crop_to_patches": False}

    def check(self, config: Any) -> Family:
        vision = config.vision_config
        if vision.image_size // vision.patch_size % vision.hidden_stride:
            raise CodebookError(
                f"ovis2 whose {vision.image_size} pixels are no multiple of {vision.hidden_stride} patches is not "
                "supported, since its tower pads them; use another size"
            )
        return self

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.visual_embeddings_table

    def tower_layers(self, model: Model) -> nn.ModuleList:
        return model.base_model.vision_tower.transformer.encoder.layers

    def attention_of(self, layer: Any) -> nn.Module:
        return layer.attention

    def merge(self, model: Model) -> int:
        return int(model.config.vision_config.hidden_stride)

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        return [broken_layouts(ids, self.token(model, kind), self.grid(model), view_first=True) for ids in prompts]

    def words(self, model: Model, ids: Tensor) -> Tensor:
        marks = torch.tensor(model.config.visual_indicator_token_ids, device=ids.device)
        table = model.base_model.visual_embeddings_table.weight[-len(marks) :]
        is_mark = ids[..., None] == marks
        own = table[is_mark.long().argmax(-1)].to(table.dtype)
        return torch.where(is_mark.any(-1, keepdim=True), own, super().words(model, ids))

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        out = model.base_model.get_image_features(pixel_values=pixel_values, return_dict=True)
        # The tower itself has put the patches of a token side by side.
        patches = out.last_hidden_state.unflatten(-1, (self.merge(model) ** 2, -1)).mean(-2)
        return out.pooler_output, patches, None
