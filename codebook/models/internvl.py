"""InternVL: crops of an image and its whole view one after the other, each of them pixel-shuffled to fewer tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from codebook.errors import CodebookError
from codebook.models.base import Family, Model
from codebook.models.encoded import Encoded
from codebook.models.layout import Layout, crops_and_view, images_per_run


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
        grid, token = self.grid(model), self.token(model, kind)
        # The processor puts text between images. Which crops make a row depends on the picture's shape, not known here.
        per_run = (images_per_run(ids, token, grid[0] * grid[1], kind) for ids in prompts)
        return [[crops_and_view(count, grid) for count in counts] for counts in per_run]

    def tower_features(self, model: Model, out: Any) -> Tensor:
        layer = model.config.vision_feature_layer
        return out.last_hidden_state if layer == -1 else out.hidden_states[layer]

    def patches(self, model: Model) -> tuple[int, int]:
        config = model.config.vision_config
        (height, width), (down, across) = config.image_size, config.patch_size
        return height // down, width // across
