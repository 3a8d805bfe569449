"""The one mechanism that prunes any supported model: plain torch hooks, gone when the context is left.

Every stage works alike, whatever its layer: the input of that decoder layer is gathered down to the text and the kept
visual tokens, values that the pruner merged are written over theirs, and from there on each layer gets hidden states,
rotary embeddings and a mask of that shorter sequence, and stores only its keys and values. Before the LLM means layer
0. Which logical columns a cache layer stores (`KeptIndex`) is all that is needed to make any later mask: decoding,
ragged batches, continuation.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codebook import models
from codebook.errors import CodebookError
from codebook.models import Encoded
from codebook.pruning.engine.cache import PrunedLayer, pruned_layer
from codebook.pruning.engine.forward import Forward
from codebook.pruning.engine.tap import tap
from codebook.pruning.schedule import Schedule

ATTENTION = {"cpu": ("sdpa", "eager"), "cuda": ("sdpa", "eager", "flex_attention")}
"""Kernels of the LLM's attention, by device: compiled for CPUs, FlexAttention with a dense mask ends the process."""

_active: weakref.WeakSet[Any] = weakref.WeakSet()


class Pruning:
    """The context in which a model's visual tokens are pruned by a schedule; made by calling the schedule.

    Attributes
    ----------
    images : list[Image]
        After a forward with images: those that its prompts show, in order of rows, and how their tokens are laid out.
    kept : list[list[Tensor]]
        For each of them the tokens (int64) that survived each stage, by their places among the image's visual tokens:
        `image.locate` gives grid, row and column; in an image of one grid it is the raster position.
    """

    def __init__(self, model: Any, schedule: Schedule) -> None:
        self.model, self.schedule = model, schedule
        self.family = models.family(model)
        self.lm = model.get_decoder()
        schedule.check_layers(len(self.lm.layers))
        device, attention = model.device.type, self.lm.config._attn_implementation
        if attention not in (able := ATTENTION.get(device, ATTENTION["cpu"])):
            names = " or ".join(f"'{name}'" for name in able)
            raise CodebookError(
                f"attention '{attention}' is not supported on {device}: load the model with attn_implementation={names}"
            )
        if schedule.positions == "compact" and self.family.axes > 1:
            raise CodebookError(
                f"positions of {self.family.name} have {self.family.axes} axes and cannot be renumbered: use "
                "positions='keep'"
            )
        self.stages = {stage.layer: stage for stage in schedule.stages}
        self.images: list[models.Image] = []
        self.kept: list[list[Tensor]] = []
        self._signature = inspect.signature(model.base_model.forward)

    def __enter__(self) -> Pruning:
        if self.model in _active:
            raise CodebookError("the model is already being pruned: join the stages in one schedule instead of nesting")
        _active.add(self.model)
        self._inputs: dict[str, Any] | None = None
        self._forward: Forward | None = None
        self._encoded: dict[str, Encoded] = {}
        self._encoding: Encoded | None = None
        with contextlib.ExitStack() as undo:
            undo.callback(_active.discard, self.model)
            for module, hook in (
                (self.model.base_model, self._on_base),
                (self.lm, self._on_decoder),
                *((layer, partial(self._on_layer, i)) for i, layer in enumerate(self.lm.layers)),
            ):
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            undo.callback(self.lm.register_forward_hook(self._after_decoder).remove)
            for kind in models.KINDS:
                self._watch(kind, undo)
            undo.enter_context(self.family.patched_extra_inputs(self.model, self._narrow))
            for stage in self.schedule.stages:
                if stage.pruner.uses_attention:
                    undo.callback(tap(self.lm.layers[stage.layer - 1].self_attn, self._on_attention))
            if any(stage.pruner.uses_vision for stage in self.schedule.stages):
                undo.callback(tap(self.family.vision_attention(self.model), self._on_vision_attention))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._inputs = self._forward = None
        self._encoded = {}
        self._undo.close()

    def _watch(self, kind: str, undo: contextlib.ExitStack) -> None:
        """Note what each call of the model's `get_image_features` or `get_video_features` encodes.

        `generate` calls it before the first forward, and no module's arguments hold as much.
        """
        base, name = self.model.base_model, f"get_{kind}_features"
        if not hasattr(base, name):
            return
        stock = getattr(base, name)
        signature = inspect.signature(stock)

        @functools.wraps(stock)
        def encode(*args: Any, **kwargs: Any) -> Any:
            if self._encoding is not None:  # a part of the call that is being noted
                return stock(*args, **kwargs)
            self._encoding = call = Encoded(kind, dict(signature.bind_partial(*args, **kwargs).arguments))
            try:
                call.output = stock(*args, **kwargs)
            finally:
                self._encoding = None
            self._encoded[kind] = call
            return call.output

        own = vars(base).get(name)
        setattr(base, name, encode)
        undo.callback(partial(delattr, base, name) if own is None else partial(setattr, base, name, own))

    def _on_vision_attention(self, query: Tensor, key: Tensor, scaling: float) -> None:
        if self._encoding is not None:
            if self.family.tower_rows:  # in one call; `remember` may have let the new images through before
                self._encoding.attention.clear()
            self._encoding.attention.append((query, key, scaling))

    def _on_base(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        kinds = [kind for kind, pixels in models.KINDS.items() if _shows(given, kind, pixels)]
        embeds = given.get("inputs_embeds")
        if given.get("input_ids") is None and (kinds or (embeds is not None and embeds.shape[1] > 1)):
            raise CodebookError("pass input_ids: from inputs_embeds alone the visual tokens cannot be found")
        ids = given.get("input_ids")
        for kind, call in self._encoded.items():  # chunked prefill of some versions loses the images without a word
            waits = not call.shown and kind not in kinds
            if waits and ids is not None and torch.isin(ids, self.family.token(self.model, kind)).any():
                raise models.whole_images_error(
                    kind, f"{kind} tokens came without the {kind}s that were encoded for them"
                )
        # Without kinds, image tokens are text: generated ones, or of an earlier turn.
        self._inputs = given | {"kinds": kinds, "blocks": self.family.blocks(self.model, given)}

    def _on_decoder(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeds, given = kwargs.get("inputs_embeds"), self._inputs
        self._inputs = None
        if embeds is None:  # text alone, straight to the decoder: only shape and device matter
            ids = args[0] if args else kwargs["input_ids"]
            embeds = torch.empty(*ids.shape, 0, device=ids.device, dtype=self.model.dtype)
        # Some base models make masks of their own from the one that they were given.
        mask = (kwargs if given is None else given).get("attention_mask")
        self._forward = forward = Forward(self.family, self.model, embeds, mask)
        if given is None:
            return
        forward.blocks = given["blocks"]
        if given["kinds"]:
            forward.check_mask()
            encoded = {kind: self._call(kind, given) for kind in given["kinds"]}
            forward.find_images(given["input_ids"], encoded, self.schedule.quotas == "shared", self.schedule.spread)
            self.images, self.kept = forward.images, [[] for _ in forward.images]

    def _call(self, kind: str, given: dict[str, Any]) -> Encoded | None:
        """The call that encoded a forward's images, if it was made in this context."""
        call, output = self._encoded.get(kind), (given.get("mm_encoder_outputs") or {}).get(kind)
        if call is None or (output is not None and output is not call.output):
            return None
        call.shown = True
        return call

    def _on_layer(self, i: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self._forward
        if forward is None:
            return None
        hidden = args[0]
        if i in self.stages and forward.images:
            encoded = dict(self._encoded)  # a stage may encode an image anew: that call is no prompt's
            hidden = forward.prune(self.stages[i], hidden)
            self._encoded, forward.attention = encoded, None
            for log, kept in zip(self.kept, forward.kept, strict=True):
                log.append(kept)
        cache = kwargs.get("past_key_values")
        entry = cache.layers[i] if cache is not None and i < len(cache.layers) else None
        past = entry.index if isinstance(entry, PrunedLayer) else None
        if forward.sequence is None and past is None:
            forward.layer_before = layer, kwargs["position_embeddings"]
            return None
        pruned = None if cache is None else pruned_layer(cache, i)
        cached = (0, 0) if pruned is None else (pruned.get_seq_length(), pruned.physical)
        index, mask, rotary = forward.view(layer, past, cached, self.schedule.positions == "compact", kwargs)
        if pruned is not None:
            pruned.index = index
        forward.layer_before = layer, rotary
        changed = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
        return (hidden, *args[1:]), kwargs | changed

    def _narrow(self, x: Tensor) -> Tensor:
        sequence = None if self._forward is None else self._forward.sequence
        return x if sequence is None else sequence.gather(x)

    def _on_attention(self, query: Tensor, key: Tensor, scaling: float) -> None:
        if self._forward is not None and self._forward.images:
            self._forward.attention = query, key, scaling

    def _after_decoder(self, _: Any, args: tuple[Any, ...], output: Any) -> Any:
        forward, self._forward = self._forward, None
        if forward is None or forward.sequence is None:
            return None
        if isinstance(output, tuple):
            return (forward.restore(output[0]), *output[1:])
        output.last_hidden_state = forward.restore(output.last_hidden_state)
        return output


def _shows(given: dict[str, Any], kind: str, pixels: str) -> bool:
    return given.get(pixels) is not None or (given.get("mm_encoder_outputs") or {}).get(kind) is not None
