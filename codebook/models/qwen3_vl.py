"""Qwen3-VL: Qwen2-VL with text between frames, and visual features added to the first decoder layers (deepstack).

The reasoner of Cosmos 3 is one. Qwen3.5 has no deepstack, and a decoder of mostly linear attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from codebook.models.base import Model
from codebook.models.qwen2_vl import Qwen2VL
from codebook.models.replacing import replaced


class Qwen3VL(Qwen2VL):
    name = "qwen3_vl"

    def width(self, model: Model) -> int:
        return super().width(model) * (1 + len(model.config.vision_config.deepstack_visual_indexes))

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        out, call = self.encoded_views(model, pixel_values)
        features = [out.pooler_output, *out.deepstack_features]
        values = list(out.last_hidden_state.split(out.last_hidden_state.shape[0] // len(out.pooler_output)))
        wide = torch.cat([torch.stack(list(part)) for part in features], dim=-1)
        return wide, torch.stack(self.pack(model, call, values)), None

    def answer(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> Tensor:
        own, *added = embeds.split(super().width(model), dim=-1)
        hidden = model.get_decoder()(
            inputs_embeds=own,
            use_cache=False,
            visual_pos_masks=torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device),  # zeros to text
            deepstack_visual_embeds=[part.flatten(0, 1) for part in added],
            **self.probe_arguments(model, embeds, start, grid),
        ).last_hidden_state
        return model.get_output_embeddings()(hidden[:, -1])

    @contextlib.contextmanager
    def patched_extra_inputs(self, model: Model, gather: Callable[[Tensor], Tensor]) -> Iterator[None]:
        def shortened(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def process(hidden: Tensor, visual: Tensor, embeds: Tensor) -> Tensor:
                if hidden.shape[1] == visual.shape[1]:
                    return stock(hidden, visual, embeds)
                added = hidden.new_zeros(*visual.shape, hidden.shape[-1])
                # Scattered and not indexed: how many places a mask has, the host would wait to know.
                return hidden + gather(added.masked_scatter(visual.to(hidden.device)[..., None], embeds.to(hidden)))

            return process

        with replaced(model.get_decoder(), "_deepstack_process", shortened):
            yield


class Qwen3VLMoe(Qwen3VL):
    name = "qwen3_vl_moe"


class Cosmos3Omni(Qwen3VL):
    name = "cosmos3_omni"
    since = "5.23"


class Qwen35(Qwen2VL):
    name = "qwen3_5"
    since = "5.21"


class Qwen35Moe(Qwen2VL):
    name = "qwen3_5_moe"
    since = "5.21"
