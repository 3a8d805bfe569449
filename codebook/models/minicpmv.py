"""MiniCPM-V 4.6 and 4.7, MiniCPM-OCR: the whole view of an image, then crops of it, in one row of the tower.

Its decoder is Qwen3.5's. In 4.7, positions have three axes, and crops share those of the view that they are cut from.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from PIL import Image as Picture
from torch import Tensor, nn

from codebook.errors import CodebookError
from codebook.models import any_size
from codebook.models.any_size import AnySize
from codebook.models.base import Family, Model, Processor
from codebook.models.encoded import Encoded
from codebook.models.layout import (
    KINDS,
    Grid,
    Layout,
    crop_boxes,
    next_crop,
    pool_patches,
    token_runs,
    whole_images_error,
)


class MiniCPMV46(AnySize):
    name = "minicpmv4_6"
    since = "5.23"
    reusable_prefix = False

    def check(self, config: Any) -> Family:
        if not 0 <= config.insert_layer_id < config.vision_config.num_hidden_layers - 1:
            raise CodebookError(
                f"{self.name} whose tower merges patches in no layer before its last is not supported; use one with a "
                "smaller insert_layer_id"
            )
        return self

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.merger

    def merge(self, model: Model) -> int:
        return _merge(model, model.config.downsample_mode)

    def sizes(self, model: Model, encoded: Encoded) -> list[tuple[int, int, int]]:
        merge = _merge(model, encoded.given.get("downsample_mode") or model.config.downsample_mode)
        return [(1, rows // merge, cols // merge) for rows, cols in _patch_grids(encoded)]

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        views, token = super().layouts(model, kind, prompts, encoded), self.token(model, kind)
        return [_joined(kind, ids, token, own) for ids, own in zip(prompts, views, strict=True)]

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        row = _one_row(encoded.given[KINDS[encoded.kind]])[0]
        return list(row.split([rows * cols * row.shape[1] for rows, cols in _patch_grids(encoded)], -1))

    def pooled(self, model: Model, patches: Tensor, rows: int, cols: int) -> Tensor:
        merge = _projector_merge(model)  # the tower has merged them already, unless it does not in this mode
        return pool_patches(patches, cols * merge, merge)

    def view(self, processor: Processor, picture: Picture.Image) -> Tensor:
        images = processor.image_processor
        patches = any_size.VIEW_SIDE * {"16x": 4, "4x": 2}[images.downsample_mode]
        side = patches * images.patch_size
        # do_resize=False would end in an error of some of the stock classes.
        square = picture.resize((side, side))
        made = images(images=square, scale_resolution=side, slice_mode=False, return_tensors="pt")
        if made["target_sizes"].tolist() != [[patches, patches]]:
            raise CodebookError(
                f"the processor makes other sizes of a picture of {side} x {side} pixels: let it keep them, by "
                "small_image_upsize='always'"
            )
        return made["pixel_values"]

    def view_arguments(self, model: Model, pixel_values: Tensor) -> dict[str, Any]:
        side = any_size.VIEW_SIDE * self.merge(model)
        sizes = torch.full((len(pixel_values), 2), side, device=pixel_values.device)
        return {"pixel_values": _one_row(pixel_values), "target_sizes": sizes}


class MiniCPMOcr(MiniCPMV46):
    name = "minicpm_ocr"


class MiniCPMV47(MiniCPMV46):
    name = "minicpmv4_7"
    axes: ClassVar[int] = 3

    def probe_arguments(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        # Positions depend on the tokens that begin and end an image, which are known by their embeddings.
        config, stop = model.config, start + grid[0] * grid[1]
        ids = torch.full((1, embeds.shape[1]), -1, device=embeds.device)
        for mark in (config.image_start_id, config.image_end_id, config.newline_id):
            if mark is not None:
                vector = self.words(model, torch.tensor([mark], device=embeds.device))
                ids[(embeds[:1] == vector).all(-1)] = mark
        types = torch.zeros_like(ids)
        types[:, start:stop] = 1
        sizes = torch.tensor([grid]) * self.merge(model)
        positions, _ = model.base_model.get_rope_index(ids, mm_token_type_ids=types, target_sizes=sizes)
        return {"position_ids": positions.expand(-1, len(embeds), -1)}


def _projector_merge(model: Model) -> int:
    """What the tower puts out, down and across, that makes one visual token."""
    return int(model.config.merge_kernel_size[0] ** model.config.merger_times)


def _merge(model: Model, mode: str) -> int:
    """Patches down, and across, that make one visual token."""
    return _projector_merge(model) * (1 if mode == "4x" else 2)


def _patch_grids(encoded: Encoded) -> list[tuple[int, int]]:
    """Rows and columns of patches of each view or crop."""
    sizes = encoded.given["target_sizes" if encoded.kind == "image" else "target_sizes_videos"]
    return [(rows, cols) for rows, cols in sizes.tolist()] * len(encoded.given[KINDS[encoded.kind]])


def _one_row(pixels: Tensor) -> Tensor:
    """(1, 3, P, L), side by side: pixels (n, 3, P, l) of patches P pixels high."""
    return pixels.permute(1, 2, 0, 3).flatten(2)[None]


def _joined(kind: str, ids: list[int], token: int, views: list[Layout]) -> list[Layout]:
    """The layouts of a prompt's images, from those of their views and crops; before each view stands the same token.

    Frames of a video are those between which there is nothing but the tokens that end one and begin the next.
    """
    runs = token_runs(ids, token)
    if [length for _, length in runs] != [view.length for view in views] or (runs and not runs[0][0]):
        raise whole_images_error(kind, f"the {kind} tokens of a prompt are not those of the encoded {kind}s")
    gaps = [start - sum(before) for (start, _), before in zip(runs[1:], runs, strict=False)]
    firsts = [i for i, (start, _) in enumerate(runs) if ids[start - 1] == ids[runs[0][0] - 1]]
    images: list[list[Grid]] = []
    for first, stop in pairwise([*firsts, len(runs)]):
        view, *crops = (view.grids[0] for view in views[first:stop])
        if kind == "image" or not first or gaps[first - 1] > 2:
            images.append([])
        places: list[tuple[int, int]] = []
        for gap in gaps[first : stop - 1]:
            places.append(next_crop(places, gap))
        boxes = crop_boxes(places)
        images[-1] += [view, *(replace(crop, kind="crop", box=box) for crop, box in zip(crops, boxes, strict=True))]
    return [_one_after_another(grids) for grids in images]


def _one_after_another(grids: list[Grid]) -> Layout:
    """The layout of an image of these grids, each of them a piece."""
    starts = accumulate((grid.count for grid in grids), initial=0)
    placed = tuple(replace(grid, start=start) for grid, start in zip(grids, starts, strict=False))
    return Layout(sum(grid.count for grid in grids), placed, len(grids))
