"""LFM2-VL: images of any size, squares of patches merged into tokens; crops are images of their own, with text between.

Its decoder is of short convolutions for the most part, and so is LFM3-VL's, which has Qwen2-VL's grids.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from codebook.errors import CodebookError
from codebook.models.base import Family, Model, Processor
from codebook.models.encoded import Encoded
from codebook.models.layout import Layout, layouts_per_row
from codebook.models.qwen2_vl import Qwen2VL

VIEW_TOKENS = 16
"""Visual tokens per side of the images that a codebook is built from, stretched to a square (512 pixels with patches
of 16, the most that the processor leaves whole)."""


class Lfm2VL(Family):
    name = "lfm2_vl"
    tower_rows = False
    reusable_prefix = False
    one_view: ClassVar[dict[str, Any]] = {"do_image_splitting": False}

    def check(self, config: Any) -> Family:
        if config.text_config.conv_bias:
            raise CodebookError(f"{self.name} with conv_bias lets padding leak into its state: use one without")
        return self

    def vision_attention(self, model: Model) -> nn.Module:
        return model.base_model.vision_tower.encoder.layers[-1].self_attn

    def grid(self, model: Model) -> tuple[int, int]:
        return VIEW_TOKENS, VIEW_TOKENS

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        if encoded is None:
            raise self.unseen_error(kind)
        layouts = [Layout.stacked(1, rows, cols, "view") for rows, cols in self.sizes(model, encoded)]
        return layouts_per_row(kind, layouts, [ids.count(self.token(model, kind)) for ids in prompts])

    def sizes(self, model: Model, encoded: Encoded) -> list[tuple[int, int]]:
        """Rows and columns of visual tokens of each image or crop."""
        merge = model.config.downsample_factor
        return [(rows // merge, cols // merge) for rows, cols in encoded.given["spatial_shapes"].tolist()]

    def patches(self, model: Model, encoded: Encoded) -> list[int]:
        return encoded.given["spatial_shapes"].prod(-1).tolist()

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        own = zip(encoded.given["pixel_values"], self.patches(model, encoded), strict=True)
        return [pixels[:count] for pixels, count in own]

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        merge = model.config.downsample_factor
        sizes = zip(values, self.sizes(model, encoded), strict=True)
        return [x.view(rows, merge, cols, merge, -1).mean((1, 3)).flatten(0, 1) for x, (rows, cols) in sizes]

    def view(self, processor: Processor, picture: Any) -> Tensor:
        images = processor.image_processor
        side = VIEW_TOKENS * images.downsample_factor
        size = (side * images.encoder_patch_size,) * 2
        made = images(images=picture.resize(size), return_tensors="pt", **self.one_view)
        if made["spatial_shapes"].tolist() != [[side, side]]:
            raise CodebookError(
                f"the processor makes other sizes of a picture of {size[0]} x {size[1]} pixels: let it keep them, by "
                f"max_image_tokens of at least {VIEW_TOKENS**2}"
            )
        return made["pixel_values"]

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        side = VIEW_TOKENS * model.config.downsample_factor
        given = {
            "pixel_values": pixel_values[:, : side**2],  # what follows is padding
            "spatial_shapes": torch.full((len(pixel_values), 2), side, device=pixel_values.device),
            "pixel_attention_mask": torch.ones(
                len(pixel_values), side**2, dtype=torch.long, device=pixel_values.device
            ),
        }
        out = model.base_model.get_image_features(**given, return_dict=True)
        return (
            torch.stack(list(out.pooler_output)),
            torch.stack(self.pack(model, Encoded("image", given), list(out.last_hidden_state))),
            None,
        )


class Lfm3VL(Qwen2VL):
    name = "lfm3_vl"
    axes = 1

    def tower(self, model: Model) -> nn.Module:
        return model.base_model.vision_tower

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.multi_modal_projector

    def vision_attention(self, model: Model) -> nn.Module:
        layers: Any = self.tower(model).layers  # attention and convolutions
        return next(layer.self_attn for layer in reversed(layers) if hasattr(layer, "self_attn"))

    def rotary(self, model: Model, embeds: Tensor, positions: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
        attention: Any = layer.self_attn
        return model.get_decoder().rotary_emb(embeds, positions, attention.layer_type)

    def probe_arguments(self, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        return {}
