"""Idefics3 and SmolVLM: crops of an image, with text that names their places between them, then its whole view."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from codebook.models.base import Family, Model
from codebook.models.encoded import Encoded
from codebook.models.layout import Grid, Layout, pool_patches, token_runs, whole_images_error


class Idefics3(Family):
    name = "idefics3"
    tower_rows = False
    one_view: ClassVar[dict[str, Any]] = {"do_image_splitting": False}

    def tower(self, model: Model) -> nn.Module:
        return model.base_model.vision_model

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.connector

    def vision_attention(self, model: Model) -> nn.Module:
        return model.base_model.vision_model.encoder.layers[-1].self_attn

    def grid(self, model: Model) -> tuple[int, int]:
        side = self._side(model) // model.config.scale_factor
        return side, side

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        return [self._row(model, kind, ids) for ids in prompts]

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        pixels = encoded.given["pixel_values"].flatten(0, 1)
        return list(pixels[pixels.flatten(1).any(1)])  # the model too drops crops that are all zero: padding

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        return [pool_patches(patches, self._side(model), model.config.scale_factor) for patches in values]

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        crops = pixel_values if pixel_values.dim() == 5 else pixel_values[:, None]
        out = model.base_model.get_image_features(pixel_values=crops[:, -1:], return_dict=True)
        call = Encoded("image", {"pixel_values": crops})
        return (
            torch.stack(list(out.pooler_output)),
            torch.stack(self.pack(model, call, list(out.last_hidden_state))),
            None,
        )

    def _side(self, model: Model) -> int:
        return model.config.vision_config.image_size // model.config.vision_config.patch_size

    def _row(self, model: Model, kind: str, ids: list[int]) -> list[Layout]:
        """The images of one prompt: each ends with its whole view, which always follows the same tag token.

        Between two crops of a row of crops there are two tokens of text, between rows more.
        """
        rows, cols = self.grid(model)
        out: list[Layout] = []
        crops: list[tuple[int, int]] = []  # row and column of each crop of the image so far
        found, after = token_runs(ids, self.token(model, kind)), 0
        for start, length in found:
            if length != rows * cols or not start:
                raise whole_images_error(kind, f"a run of {length} image tokens is not {rows * cols}")
            if ids[start - 1] == ids[found[-1][0] - 1]:
                out.append(_crops_then_view(crops, rows, cols))
                crops = []
            elif not crops:
                crops.append((0, 0))
            else:
                down, across = crops[-1]
                crops.append((down, across + 1) if start - after == 2 else (down + 1, 0))
            after = start + length
        return out


class SmolVLM(Idefics3):
    name = "smolvlm"


def _crops_then_view(crops: list[tuple[int, int]], rows: int, cols: int) -> Layout:
    """Layout of an image of these crops (row and column of each, empty if it has none), then its whole view."""
    n = rows * cols
    down, across = (max(place[axis] for place in crops) + 1 if crops else 1 for axis in (0, 1))
    grids = [
        Grid(i * n, rows, cols, "crop", box=(x / across, y / down, (x + 1) / across, (y + 1) / down))
        for i, (y, x) in enumerate(crops)
    ]
    grids.append(Grid(len(crops) * n, rows, cols, "view"))
    return Layout(len(grids) * n, tuple(grids), len(grids))
