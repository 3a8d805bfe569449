"""Granite 4 Vision: LLaVA-NeXT whose features are added to hidden states before several decoder layers, the first too.

In the prompt its image tokens are empty.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from codebook.errors import CodebookError
from codebook.models.base import Family, Model
from codebook.models.encoded import Encoded
from codebook.models.layout import pool_patches
from codebook.models.llava_next import LlavaNext

TAKEN = ("deepstack_features", "vision_mask")
"""Arguments of the decoder: by layers what is added before them, and where."""

HANDED_ON = "codebook_added_features"
"""Keyword argument that brings these two to the layers, since the decoder could add to a whole prompt alone."""


class Granite4Vision(LlavaNext):
    name = "granite4_vision"
    since = "5.23"
    reusable_prefix = False

    def check(self, config: Any) -> Family:
        if 0 not in {layer for _, layer in config.deepstack_layer_map or ()}:
            raise CodebookError(
                f"{self.name} whose image tokens are empty in the first layer is not supported; use one whose "
                "deepstack_layer_map has layer 0"
            )
        return super().check(config)

    def projector(self, model: Model) -> nn.Module:
        return _added(model)[0][2]

    def layer(self, model: Model) -> int:
        count = len(self.tower_layers(model)) + 1
        return max((layer for _, layer, _ in _added(model)), key=lambda index: index % count)

    def merge(self, model: Model) -> int:
        return 2  # any other number would not fit to its features of every second patch

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        cols = self.patches(model)[1]
        return super().pack(model, encoded, [pool_patches(own, cols, self.merge(model)) for own in values])

    def entering(self, model: Model, embeds: Tensor, given: Mapping[str, Any]) -> Tensor:
        features, visual = given.get(HANDED_ON) or map(given.get, TAKEN)
        if features is None:
            return embeds
        hidden = embeds * model.get_decoder().embedding_multiplier
        return hidden.masked_scatter(visual.to(hidden.device), features[0].to(hidden))

    @contextlib.contextmanager
    def patched_extra_inputs(self, model: Model, gather: Callable[[Tensor], Tensor]) -> Iterator[None]:
        def take(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {HANDED_ON: tuple(map(kwargs.get, TAKEN))} | dict.fromkeys(TAKEN)

        def add(i: int, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            features, visual = kwargs[HANDED_ON]
            hidden, rest = args[0], {name: value for name, value in kwargs.items() if name != HANDED_ON}
            if features is not None and i in features:
                added = hidden.new_zeros(*visual.shape[:2], hidden.shape[-1])
                hidden = hidden + gather(added.masked_scatter(visual.to(hidden.device), features[i].to(hidden)))
            return (hidden, *args[1:]), rest

        decoder = model.get_decoder()
        with contextlib.ExitStack() as undo:
            undo.callback(decoder.register_forward_pre_hook(take, with_kwargs=True).remove)
            for i, layer in enumerate(decoder.layers):  # before a stage prunes what enters the layer
                hook = layer.register_forward_pre_hook(partial(add, i), with_kwargs=True, prepend=True)
                undo.callback(hook.remove)
            yield

    def width(self, model: Model) -> int:
        return super().width(model) * len(_added(model))

    def words(self, model: Model, ids: Tensor) -> Tensor:
        return super().words(model, ids) * model.get_decoder().embedding_multiplier

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        views = pixel_values[:, 0] if pixel_values.dim() == 5 else pixel_values
        states = model.base_model.vision_tower(views, output_hidden_states=True).hidden_states
        hidden, cols, first = states[self.layer(model)], self.patches(model)[1], int(self.has_cls(model))
        patches = [pool_patches(own, cols, self.merge(model)) for own in hidden[:, first:]]
        wide = [project(states[layer][:, first:]) for _, layer, project in _added(model)]
        return torch.cat(wide, dim=-1), torch.stack(patches), hidden[:, 0] if first else None

    def answer(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> Tensor:
        parts = embeds.split(super().width(model), dim=-1)
        hidden = model.get_decoder()(
            inputs_embeds=torch.zeros_like(parts[0]),
            use_cache=False,
            vision_mask=torch.ones(*embeds.shape[:2], 1, dtype=torch.bool, device=embeds.device),  # to text, too
            deepstack_features={i: part.flatten(0, 1) for (i, *_), part in zip(_added(model), parts, strict=True)},
        ).last_hidden_state
        return model.get_output_embeddings()(hidden[:, -1]) / model.config.get_text_config().logits_scaling


def _added(model: Model) -> list[tuple[int, int, nn.Module]]:
    """What is added to hidden states: before which decoder layer, from which of the tower's states, by which module.

    In the order of decoder layers; of two for one layer, the stock model uses the last.
    """
    base, config = model.base_model, model.config
    places = [*config.deepstack_layer_map, *((config.spatial_vision_layer, i) for i in config.spatial_target_layers)]
    modules = [*base.layerwise_projectors, *base.spatial_projectors]
    found = {i: (i, layer, module) for (layer, i), module in zip(places, modules, strict=False)}
    return [found[i] for i in sorted(found) if i < len(model.get_decoder().layers)]
