"""Video-LLaVA: LLaVA-1.5 with a second tower for videos, whose frames each begin with their [CLS] token."""

from __future__ import annotations

import torch
from PIL import Image as Picture
from torch import Tensor, nn
from torch.nn.functional import pad

from codebook.models.base import Family, Model, Processor
from codebook.models.encoded import Encoded
from codebook.models.layout import KINDS, Grid, Layout, layouts_per_row
from codebook.models.llava import Llava


class VideoLlava(Llava):
    name = "video_llava"
    since = "5.23"
    encode = Family.encode  # both of its towers take one size

    def tower(self, model: Model) -> nn.Module:
        return model.base_model.image_tower

    def towers(self, model: Model) -> list[nn.Module]:
        return [model.base_model.image_tower, model.base_model.video_tower]

    def vision_attentions(self, model: Model) -> list[nn.Module]:
        image = self.vision_attention(model)
        path = next(name for name, module in self.tower(model).named_modules() if module is image)
        return [image, model.base_model.video_tower.get_submodule(path)]

    def view(self, processor: Processor, picture: Picture.Image) -> Tensor:
        made = processor.image_processor(images=picture, return_tensors="pt")
        return made["pixel_values"] if "pixel_values" in made else made["pixel_values_images"]  # its older name

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        if kind == "image":
            return super().layouts(model, kind, prompts, encoded)
        if encoded is None:
            raise self.unseen_error(kind)
        videos, frames = encoded.given["pixel_values_videos"].shape[:2]
        (rows, cols), token = self.grid(model), self.token(model, kind)
        length = 1 + rows * cols  # the [CLS] token stands in the prompt too
        grids = tuple(Grid(i * length + 1, rows, cols, "frame") for i in range(frames))
        layout = Layout(frames * length, grids)
        return layouts_per_row(kind, [layout] * videos, [ids.count(token) for ids in prompts])

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        return list(encoded.given[KINDS[encoded.kind]])

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        if encoded.kind == "image":
            return values
        frames = pad(torch.stack(values), (0, 0, 1, 0))
        return list(frames.unflatten(0, (len(encoded.given["pixel_values_videos"]), -1)).flatten(1, 2))
