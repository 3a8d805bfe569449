"""Molmo 2: the whole view of an image, then its crops as one grid; all image tokens of a prompt see each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from PIL import Image as Picture
from torch import Tensor, nn
from torch.nn.functional import pad

from codebook.models.base import Family, Model, Processor, cache_of
from codebook.models.encoded import Encoded
from codebook.models.layout import KINDS, Grid, Layout, layouts_per_row

POOL = 2
"""Patches down, and across, that make one token of an image: its processor's setting, of which no config tells."""


class Molmo2(Family):
    name = "molmo2"
    since = "5.23"
    reusable_prefix = False
    one_view: ClassVar[dict[str, Any]] = {"max_crops": 1}

    def tower_layers(self, model: Model) -> nn.ModuleList:
        return model.base_model.vision_tower.layers

    def layer(self, model: Model) -> int:
        count = len(self.tower_layers(model))
        return max(number % count for number in model.config.adapter_config.vision_feature_layer) + 1

    def attention_norm(self, layer: Any) -> nn.Module:
        return nn.Identity() if layer.norm_after else layer.input_layernorm

    def rotary_module(self, model: Model, layer: Any) -> nn.Module:
        decoder = model.get_decoder()
        scaled = decoder.rope_types[layer.self_attn.layer_idx] == "scaled"
        return decoder.rotary_emb if scaled else decoder.rotary_emb_unscaled

    def view_size(self, model: Model, rows: int, cols: int) -> tuple[int, int]:
        height, width = model.config.vision_config.image_size
        return height, width

    def patches(self, model: Model) -> tuple[int, int]:
        rows, cols = (side // model.config.vision_config.patch_size for side in model.config.vision_config.image_size)
        return rows, cols

    def merge(self, model: Model) -> int:
        return POOL

    def grid(self, model: Model) -> tuple[int, int]:
        rows, cols = self.patches(model)
        return -(-rows // POOL), -(-cols // POOL)

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        if encoded is None:
            raise self.unseen_error(kind)
        token = self.token(model, kind)
        return layouts_per_row(kind, _layouts(encoded), [ids.count(token) for ids in prompts])

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        crops = encoded.given[KINDS[encoded.kind]].flatten(0, -3)
        ends = [int(pooled.max()) // crops.shape[1] + 1 for pooled in _pooling(encoded)]
        return [crops[start:stop] for start, stop in pairwise([0, *ends])]

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        patches, out = torch.cat(values), []
        for pooled in _pooling(encoded):
            own = (pooled >= 0).to(patches)[..., None]
            out.append((patches[pooled.clamp(min=0)] * own).sum(1) / own.sum(1))
        return out

    def blocks(self, model: Model, given: dict[str, Any]) -> Tensor | None:
        types, cache = given.get("mm_token_type_ids"), cache_of(given)
        shown = [*map(given.get, KINDS.values()), *(given.get("mm_encoder_outputs") or {}).values()]
        started = cache is not None and cache.is_initialized and all(part is None for part in shown)
        return None if types is None or started else torch.where(types == 1, 0, -1)

    def without_crops(self, model: Model, ids: list[int]) -> list[int]:
        ends = [i + 1 for i, token in enumerate(ids) if token == model.config.image_end_token_id]
        return ids[: ends[0]] + ids[ends[1] :]

    def view(self, processor: Processor, picture: Picture.Image) -> Tensor:
        return super().view(processor, picture)[:1]

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        count, (rows, cols) = len(pixel_values), self.grid(model)
        down, across = self.patches(model)
        places = torch.arange(count * down * across, device=pixel_values.device).view(count, down, across)
        # As its processor makes squares whole where the patches are none: half of what lacks in front.
        more = [part for side in (across, down) for part in (-side % POOL // 2, (1 + -side % POOL) // 2)]
        squares = pad(places, more, value=-1).unflatten(1, (rows, POOL)).unflatten(3, (cols, POOL))
        given = {
            "pixel_values": pixel_values,
            "image_token_pooling": squares.transpose(2, 3).reshape(-1, POOL**2),
            "image_grids": torch.tensor([[rows, cols, 0, 0]] * count, device=pixel_values.device),
        }
        out = model.base_model.get_image_features(**given, output_hidden_states=True, return_dict=True)
        patches = self.pack(model, Encoded("image", given), list(out.hidden_states[self.layer(model)]))
        # Features are added to the embedding of the token in whose place they stand.
        token = self.words(model, torch.tensor(self.token(model, "image"), device=pixel_values.device))
        return torch.stack(list(out.pooler_output)) + token, torch.stack(patches), None

    def probe_arguments(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        # With the tokens that begin and end the image, and those between its rows; the latter end where it does.
        end = self.words(model, torch.tensor(model.config.image_end_token_id, device=embeds.device))
        ends = (embeds[0, start:] == end).all(-1).nonzero()[:1, 0].tolist()
        stop = start + (ends[0] + 1 if ends else grid[0] * grid[1])
        types = torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        types[:, max(0, start - 1) : stop] = 1
        return {"mm_token_type_ids": types}


def _layouts(encoded: Encoded) -> list[Layout]:
    """The layout of each image or video."""
    grids = encoded.given[f"{encoded.kind}_grids"].tolist()
    if encoded.kind == "video":
        return [Layout.stacked(frames, rows, cols, "frame") for frames, rows, cols in grids]
    return [_view_and_crops(*sizes) for sizes in grids]


def _view_and_crops(rows: int, cols: int, down: int, across: int) -> Layout:
    """The layout of an image of a whole view, and crops that make one grid; there may be none."""
    view, crops = Grid(0, rows, cols, "view"), Grid(rows * cols, down, across, "crop")
    return Layout(view.count + crops.count, (view, crops) if crops.count else (view,))


def _pooling(encoded: Encoded) -> list[Tensor]:
    """For each image or video the patches (n, k) int64 of each of its tokens, among all patches; -1 for none."""
    pooled = encoded.given[f"{encoded.kind}_token_pooling"]
    return list(pooled.split([layout.length for layout in _layouts(encoded)]))
