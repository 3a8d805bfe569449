"""What families have in common whose images are one grid of any size."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image as Picture
from torch import Tensor

from codebook.models.base import Family, Model, Processor
from codebook.models.encoded import Encoded
from codebook.models.layout import KINDS, Layout, layouts_per_row, pool_patches

VIEW_SIDE = 24
"""Visual tokens per side of the images that a codebook is built from, stretched to a square (672 pixels with patches
of 14)."""


class AnySize(Family):
    """A family whose images have sizes of their own, which the call that encodes them is given.

    As it stands here, `image_grid_thw` holds frames, rows and columns of patches, and pixels come patch by patch, line
    by line.
    """

    tower_rows = False

    def merge(self, model: Model) -> int:
        return int(model.config.vision_config.spatial_merge_size)

    def grid(self, model: Model) -> tuple[int, int]:
        return VIEW_SIDE, VIEW_SIDE

    def sizes(self, model: Model, encoded: Encoded) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of visual tokens of each image or video."""
        merge = self.merge(model)
        grids = encoded.given[f"{encoded.kind}_grid_thw"].tolist()
        return [(frames, height // merge, width // merge) for frames, height, width in grids]

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        if encoded is None:
            raise self.unseen_error(kind)
        layouts = [
            Layout.stacked(frames, rows, cols, "view" if kind == "image" else "frame")
            for frames, rows, cols in self.sizes(model, encoded)
        ]
        token = self.token(model, kind)
        return layouts_per_row(kind, layouts, [ids.count(token) for ids in prompts])

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        patches = encoded.given[f"{encoded.kind}_grid_thw"].prod(-1).tolist()
        return list(encoded.given[KINDS[encoded.kind]].split(patches))

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        frames, out = iter(values), []
        for count, rows, cols in self.sizes(model, encoded):
            out.append(torch.cat([self.pooled(model, next(frames), rows, cols) for _ in range(count)]))
        return out

    def pooled(self, model: Model, patches: Tensor, rows: int, cols: int) -> Tensor:
        """(rows * cols, D): the average of each token's patches, of an image or frame (N, D)."""
        return pool_patches(patches, cols * self.merge(model), self.merge(model))

    def view(self, processor: Processor, picture: Picture.Image) -> Tensor:
        images = processor.image_processor
        side = VIEW_SIDE * images.merge_size * images.patch_size
        return images(images=picture.resize((side, side)), return_tensors="pt")["pixel_values"]

    def view_arguments(self, model: Model, pixel_values: Tensor) -> dict[str, Any]:
        """The sizes of whole views, as `get_image_features` takes them."""
        side = self.merge(model) * VIEW_SIDE
        size = torch.tensor([[1, side, side]], device=pixel_values.device)
        return {"image_grid_thw": size.repeat(len(pixel_values) // side**2, 1)}

    def encoded_views(self, model: Model, pixel_values: Tensor) -> tuple[Any, Encoded]:
        """What the model makes of whole views, and the call."""
        given = {"pixel_values": pixel_values} | self.view_arguments(model, pixel_values)
        return model.base_model.get_image_features(**given, return_dict=True), Encoded("image", given)

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        out, call = self.encoded_views(model, pixel_values)
        hidden = self.tower_features(model, out)
        projected, hidden = torch.stack(list(out.pooler_output)), hidden.reshape(-1, hidden.shape[-1])
        each = hidden.view(len(projected), -1, hidden.shape[-1])
        if each.shape[1] > projected.shape[1]:  # else the tower itself has merged the patches of a token
            each = torch.stack(self.pack(model, call, list(each)))
        return projected, each, None
