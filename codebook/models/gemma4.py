"""Gemma 4: images of any size, pooled; in sliding windows the tokens of an image see each other in both directions.

In the small ones (E2B, E4B) they do not. There each layer is given an embedding of its own for each token, and the last
layers attend to keys and values of two earlier ones; `generate` runs them on the last token of a prompt alone.

The unified one (12B) has no tower: patches, each of them a token, are projected as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NoReturn

import torch
from PIL import Image as Picture
from torch import Tensor, nn

from codebook.errors import CodebookError
from codebook.models import any_size
from codebook.models.any_size import AnySize
from codebook.models.base import Family, Model, Processor
from codebook.models.encoded import Encoded
from codebook.models.gemma3 import image_blocks, image_types
from codebook.models.layout import KINDS
from codebook.models.replacing import replaced


class Gemma4(AnySize):
    name = "gemma4"
    since = "5.23"
    reusable_prefix = False
    window_blocks = True

    def check(self, config: Any) -> Family:
        return SMALL if getattr(config.get_text_config(), "hidden_size_per_layer_input", 0) else self

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.embed_vision

    def merge(self, model: Model) -> int:
        return int(model.config.vision_config.pooling_kernel_size)

    def sizes(self, model: Model, encoded: Encoded) -> list[tuple[int, int, int]]:
        ends = encoded.given[f"{encoded.kind}_position_ids"].amax(1) + 1  # of padding, places are negative
        sizes = [(1, rows, cols) for cols, rows in (ends // self.merge(model)).tolist()]
        if encoded.kind == "image":
            return sizes
        counts = encoded.given["num_frames_per_video"].tolist()
        return [(count, *sizes[end - count][1:]) for count, end in zip(counts, accumulate(counts), strict=True)]

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        sizes = self._patches(model, encoded)
        pieces = encoded.given[KINDS[encoded.kind]].split([frames for frames, _ in sizes])
        return [piece[:, :patches] for piece, (_, patches) in zip(pieces, sizes, strict=True)]  # without padding

    def attended(self, model: Model, encoded: Encoded) -> list[tuple[int, slice]]:
        per_frame = (patches for frames, patches in self._patches(model, encoded) for _ in range(frames))
        return [(row, slice(patches)) for row, patches in enumerate(per_frame)]

    def _patches(self, model: Model, encoded: Encoded) -> list[tuple[int, int]]:
        """Frames of each image or video, and patches of each of its frames."""
        merge = self.merge(model)
        return [(frames, rows * cols * merge**2) for frames, rows, cols in self.sizes(model, encoded)]

    def blocks(self, model: Model, given: dict[str, Any]) -> Tensor | None:
        types = given.get("mm_token_type_ids")
        if types is None or model.config.get_text_config().use_bidirectional_attention != "vision":
            return None
        return image_blocks((types == 1) | (types == 2))

    def probe_arguments(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        return {"mm_token_type_ids": image_types(embeds, start, grid)}

    def view(self, processor: Processor, picture: Picture.Image) -> Tensor:
        images = processor.image_processor
        side = any_size.VIEW_SIDE * images.pooling_kernel_size
        square = picture.resize((side * images.patch_size, side * images.patch_size))
        made = images(images=square, do_resize=False, max_soft_tokens=1120, return_tensors="pt")
        return made["pixel_values"][:, : int((made["image_position_ids"] >= 0).all(-1).sum())]  # without padding

    def view_arguments(self, model: Model, pixel_values: Tensor) -> dict[str, Any]:
        side = torch.arange(any_size.VIEW_SIDE * self.merge(model), device=pixel_values.device)
        places = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).flatten(0, 1)
        return {"image_position_ids": places.expand(len(pixel_values), -1, -1)}


class Gemma4Small(Gemma4):
    """E2B and E4B."""

    def check(self, config: Any) -> Family:
        return self

    def keys_layers(self, model: Model) -> list[int]:
        out, stored = [], {}
        for i, layer in enumerate(model.get_decoder().layers):
            attention = layer.self_attn
            if attention.store_full_length_kv:
                stored[attention.layer_type] = i
            out.append(stored[attention.layer_type] if attention.is_kv_shared_layer else i)
        return out

    @contextlib.contextmanager
    def patched_extra_inputs(self, model: Model, gather: Callable[[Tensor], Tensor]) -> Iterator[None]:
        def whole(stock: Callable[..., Any]) -> Callable[..., Any]:
            def cut(hidden: Tensor, inputs: Tensor, rotary: Any, masks: Any, *args: Any, **kwargs: Any) -> Any:
                # In which columns the last tokens of a shortened sequence stand, the hooks of layers know.
                kept, *others = stock(hidden, inputs, rotary, masks, *args, **kwargs)
                columns = inputs[..., 0, :1]
                return (kept, *others) if gather(columns) is columns else (kept, inputs, rotary, masks)

            return cut

        with replaced(model.get_decoder(), "_maybe_slice_kv_shared_inputs", whole):
            yield

    def width(self, model: Model) -> int:
        text = model.config.get_text_config()
        return super().width(model) + text.num_hidden_layers * int(text.hidden_size_per_layer_input)

    def words(self, model: Model, ids: Tensor) -> Tensor:
        return torch.cat([super().words(model, ids), model.get_decoder().get_per_layer_inputs(ids).flatten(-2)], dim=-1)

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        projected, patches, cls = super().image_features(model, pixel_values)
        # For the layers' own embeddings a visual token is padding.
        pad = torch.tensor(model.config.get_text_config().pad_token_id, device=projected.device)
        inputs = self.words(model, pad)[projected.shape[-1] :]
        return torch.cat([projected, inputs.expand(*projected.shape[:2], -1)], dim=-1), patches, cls

    def answer(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> Tensor:
        own, inputs = embeds.tensor_split([super().width(model)], dim=-1)
        inputs = inputs.unflatten(-1, (len(model.get_decoder().layers), -1))
        more = self.probe_arguments(model, own, start, grid)
        return model(inputs_embeds=own, per_layer_inputs=inputs, use_cache=False, logits_to_keep=1, **more).logits[
            :, -1
        ]


SMALL = Gemma4Small()


class Gemma4Unified(Gemma4):
    name = "gemma4_unified"
    window_blocks = False  # the stock class, unlike Gemma4's, lets them see each other in every layer,
    window_last = False  # and beyond the window

    def check(self, config: Any) -> Family:
        if config.get_text_config().num_kv_shared_layers:
            raise CodebookError(f"{self.name} whose layers share keys and values is not supported; use gemma4")
        return self

    def tower(self, model: Model) -> nn.Module:
        return model.base_model.embed_vision

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.embed_vision.multimodal_embedder

    def tower_layers(self, model: Model) -> NoReturn:
        raise CodebookError(
            f"{self.name} has no vision tower that methods could ask: use one that compares features, such as divprune"
        )

    def merge(self, model: Model) -> int:
        return 1
