"""LLaVA-NeXT: the whole view of an image, then its crops joined to one grid whose rows end with a newline token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codebook.models.base import Family, Model
from codebook.models.encoded import Encoded
from codebook.models.layout import Grid, Layout, layouts_per_row
from codebook.models.llava import Llava


class LlavaNext(Llava):
    name = "llava_next"
    shown_box = Family.shown_box  # what CLIP would cut out was squeezed into a square before
    encode = Family.encode  # a resized whole view alone is no image that the model knows

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        if encoded is None:
            raise self.unseen_error(kind)
        side = self.grid(model)[0]
        # The model's own packing shows where it puts newlines, tokens of the whole view and of the crops.
        marks = [torch.full((side * side, 1), 0.0 if number == 0 else 1.0) for number in self._numbers(model, encoded)]
        layouts = [_layout_of_marks(packed[:, 0], side) for packed in self._pack(model, encoded, marks, 2.0)]
        token = self.token(model, kind)
        return layouts_per_row(kind, layouts, [ids.count(token) for ids in prompts])

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        pixels, crops = encoded.given["pixel_values"], self.crops(model, encoded)
        if pixels.dim() == 4:
            return list(pixels.split(crops))
        return [image[:count] for image, count in zip(pixels, crops, strict=True)]  # without padding

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        return self._pack(model, encoded, values, 0.0)

    def crops(self, model: Model, encoded: Encoded) -> list[int]:
        """The number of crops of each image, its whole view included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        points, size = model.config.image_grid_pinpoints, model.config.vision_config.image_size
        return [image_size_to_num_patches(image, points, size) for image in encoded.given["image_sizes"]]

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        views = pixel_values[:, 0] if pixel_values.dim() == 5 else pixel_values
        hidden = model.base_model.vision_tower(views, output_hidden_states=True).hidden_states[self.layer(model)]
        patches, cls = (hidden[:, 1:], hidden[:, 0]) if self.has_cls(model) else (hidden, None)
        return model.base_model.multi_modal_projector(patches), patches, cls

    def _numbers(self, model: Model, encoded: Encoded) -> list[int]:
        """For each row of the tower, its number within its image: 0 is the whole view."""
        return [number for count in self.crops(model, encoded) for number in range(count)]

    def _pack(self, model: Model, encoded: Encoded, values: list[Tensor], newline: float) -> list[Tensor]:
        rows = torch.stack(values)
        packed = model.base_model.pack_image_features(
            rows.split(self.crops(model, encoded)),
            encoded.given["image_sizes"],
            **self._packing(model, encoded),
            image_newline=rows.new_full((rows.shape[-1],), newline),
        )
        return list(packed[0] if isinstance(packed, tuple) else packed)  # most also say how long each is

    def _packing(self, model: Model, encoded: Encoded) -> dict[str, Any]:
        return {"vision_feature_select_strategy": model.config.vision_feature_select_strategy}


def _layout_of_marks(marks: Tensor, side: int) -> Layout:
    """Layout of an image from one mark per token: 0 in the whole view, 1 in the crops, 2 for a newline."""
    grids, count = [Grid(0, side, side, "view")], side * side
    if rows := int((marks[count:] == 2).sum()) if len(marks) > count + 1 else 0:
        stride = (len(marks) - count) // rows
        grids.append(Grid(count, rows, stride - 1, "crop", stride))
    return Layout(len(marks), tuple(grids))
