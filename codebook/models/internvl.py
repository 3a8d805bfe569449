"""InternVL: crops of an image and its whole view one after the other, each of them pixel-shuffled to fewer tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from codebook.errors import CodebookError
from codebook.models.base import Family, Model
from codebook.models.encoded import Encoded
from codebook.models.layout import Grid, Layout, token_runs, whole_images_error


class InternVL(Family):
    name = "internvl"
    one_view: ClassVar[dict[str, Any]] = {"crop_to_patches": False}

    def check(self, config: Any) -> Family:
        if config.vision_feature_select_strategy != "default":
            strategy = config.vision_feature_select_strategy
            raise CodebookError(f"internvl with {strategy!r} features is not supported; use 'default'")
        return self

    def tower_layers(self, model: Model) -> nn.ModuleList:
        return model.base_model.vision_tower.encoder.layer

    def attention_of(self, layer: Any) -> nn.Module:
        return layer.attention

    def merge(self, model: Model) -> int:
        return round(1 / model.config.downsample_ratio)

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        rows, cols = self.grid(model)
        out: list[list[Layout]] = []
        for ids in prompts:
            out.append([])
            for _, length in token_runs(ids, self.token(model, kind)):  # the processor puts text between images
                if length % (rows * cols):
                    raise whole_images_error(kind, f"a run of {length} image tokens is not a multiple of {rows * cols}")
                crops = length // (rows * cols)
                # The whole view comes last. Which crops make a row depends on the picture's shape, not known here.
                grids = [Grid(i * rows * cols, rows, cols, "crop", box=None) for i in range(crops - 1)]
                grids.append(Grid((crops - 1) * rows * cols, rows, cols, "view"))
                out[-1].append(Layout(length, tuple(grids), crops))
        return out

    def tower_features(self, model: Model, out: Any) -> Tensor:
        layer = model.config.vision_feature_layer
        return out.last_hidden_state if layer == -1 else out.hidden_states[layer]

    def patches(self, model: Model) -> tuple[int, int]:
        config = model.config.vision_config
        (height, width), (down, across) = config.image_size, config.patch_size
        return height // down, width // across
