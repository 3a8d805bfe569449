"""The one mechanism that prunes any supported model: plain torch hooks, gone when the context is left.

Every stage works alike, whatever its layer: the input of that decoder layer is gathered down to the text and the kept
visual tokens, values that the pruner merged are written over theirs, and from there on each layer gets hidden states,
rotary embeddings and a mask of that shorter sequence, and stores only its keys and values. Before the LLM means layer
0. Which logical columns a cache layer stores (`KeptIndex`) is all that is needed to make any later mask: decoding,
ragged batches, continuation.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codebook import models
from codebook.errors import CodebookError
from codebook.pruning.attention import Attention, Vision, tap
from codebook.pruning.cache import PAD, KeptIndex, PrunedLayer, pruned_layer
from codebook.pruning.schedule import Schedule, Stage
from codebook.pruning.tokens import VisualTokens, digest_rows, mix

ATTENTION = ("sdpa", "eager")

_active: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True)
class ImageTokens:
    """One image's surviving tokens in the current sequence. Its integers are known on the host: no syncs.

    `start` is the first of its tokens in the current sequence, `offset` how many valid tokens of its row stand before
    it in the current sequence; the rest is as in `VisualTokens`.
    """

    row: int
    start: int
    offset: int
    total: int
    count: int
    grid: tuple[int, int]
    ordinal: Tensor
    key: Tensor
    features: Tensor
    vision: Vision | None
    encode: Callable[[int, int], Tensor] | None

    @property
    def span(self) -> slice:
        """Where it is in its row, padding not counted."""
        return slice(self.offset, self.offset + self.count)


@dataclass
class Encoded:
    """The vision tower's latest pass: its `pixels` (images, 3, H, W), and what a layer of it attended with."""

    pixels: Tensor
    attention: tuple[Tensor, Tensor, float] | None = None


@dataclass(frozen=True)
class Sequence:
    """What is left of a forward's input: `source` (B, P) int64 are places in it, -1 for padding, always on the left."""

    source: Tensor
    lengths: list[int]

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.source.shape[1]

    def gather(self, x: Tensor) -> Tensor:
        """This sequence's entries of (B or 1, L, ...); those of the padding are arbitrary."""
        index = self.source.clamp(min=0).view(*self.source.shape, *[1] * (x.dim() - 2))
        return x.expand(len(self.source), *x.shape[1:]).gather(1, index.expand(*self.source.shape, *x.shape[2:]))


class Forward:
    """One forward pass through the decoder, pruned as it goes."""

    def __init__(self, lm: Any, embeds: Tensor, mask: Any) -> None:
        self.lm, self.embeds, self.mask = lm, embeds, mask
        self.batch, self.length = embeds.shape[:2]
        self.images: list[ImageTokens] = []
        self.sequence: Sequence | None = None
        self.attention: tuple[Tensor, Tensor, float] | None = None
        self.rotary: tuple[Tensor, Tensor] | None = None
        self._views: dict[tuple[int, int], tuple[Any, ...]] = {}

    def find_images(self, family: models.Family, model: Any, input_ids: Tensor, encoded: Encoded | None) -> None:
        """Locate the prompt's images; the one place where the host waits for token ids and padding."""
        ids, on = input_ids.tolist(), self._valid(self.length).tolist()
        self.lengths = [sum(row) for row in on]
        rows = [family.images(model, row) for row in ids]
        source = _by_row(0 if encoded is None else len(encoded.pixels), [len(images) for images in rows])
        if encoded is None or source is None:  # encoded beforehand: pixels and tower were not seen
            encoded, source = None, [[0] * len(images) for images in rows]
        digests = None if encoded is None else digest_rows(encoded.pixels).to(self.embeds.device)
        for row, images in enumerate(rows):
            for place, image in enumerate(images):
                offset, end = sum(on[row][: image.start]), image.start + image.count
                if offset + image.count == self.lengths[row]:
                    raise CodebookError("a prompt ends with its visual tokens: put text after the image")
                if not all(on[row][image.start : end]):
                    raise CodebookError("the attention mask hides visual tokens: unmask them, or prune them instead")
                features, i = self.embeds[row, image.start : end], source[row][place]
                digest = digest_rows(features[None])[0] if digests is None else digests[i]
                vision, encode = None, None
                if encoded is not None:
                    encode = partial(family.encode, model, encoded.pixels[i])
                    if encoded.attention is not None:
                        query, key, scaling = encoded.attention
                        vision = Vision(query[i], key[i], scaling, family.has_cls(model))
                self.images.append(
                    ImageTokens(
                        row=row,
                        start=image.start,
                        offset=offset,
                        total=image.count,
                        count=image.count,
                        grid=(image.rows, image.cols),
                        ordinal=torch.arange(image.count, device=self.embeds.device),
                        key=mix(digest + place),
                        features=features,
                        vision=vision,
                        encode=encode,
                    )
                )

    def prune(self, stage: Stage, hidden: Tensor) -> Tensor:
        """Apply a stage to the input (B, P, d) of its layer; return what is left of it."""
        kept = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        images, merged, dropped = [], [], [0] * self.batch
        for image in self.images:
            before, values = dropped[image.row], None
            if image.count:
                index, values = self._choose(stage, image, hidden)
                if index is not None:
                    kept[image.row, image.start : image.start + image.count] = False
                    kept[image.row, image.start + index] = True
                    dropped[image.row] += image.count - len(index)
                    features = image.features[index] if values is None or stage.layer else values
                    image = replace(image, count=len(index), ordinal=image.ordinal[index], features=features)
            images.append(replace(image, offset=image.offset - before))
            merged.append(values)
        if any(dropped):
            hidden = self._shorten(kept, dropped, hidden)
            width, lengths = hidden.shape[1], self.sequence.lengths  # type: ignore[union-attr]
            self.images = [replace(i, start=width - lengths[i.row] + i.offset) for i in images]
            for image, values in zip(self.images, merged, strict=True):
                if values is not None:
                    hidden[image.row, image.start : image.start + image.count] = values
        return hidden

    def _choose(self, stage: Stage, image: ImageTokens, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Indices of an image's tokens that stay and their new values; None for all, and for unchanged ones."""
        pruner, target = stage.pruner, None if stage.keep is None else stage.count(image.total)
        if target == 0:
            return image.ordinal[:0], None
        if target is not None and target > image.count:
            raise CodebookError(
                f"the stage at layer {stage.layer} keeps {target} visual tokens, but only {image.count} are left"
            )
        if target == image.count:
            return None, None
        tokens = self._tokens(stage, image, hidden)
        index = pruner.choose(tokens) if target is None else pruner.select(tokens, target)
        if index.shape != (target or len(index),) or not len(index):
            wanted = "at least one was" if target is None else f"{target} were"
            raise CodebookError(f"{type(pruner).__name__} chose {tuple(index.shape)} tokens where {wanted} asked for")
        if len(index) == image.count:
            return None, None
        return index, pruner.merge(tokens, index)

    def _tokens(self, stage: Stage, image: ImageTokens, hidden: Tensor) -> VisualTokens:
        sequence = hidden[image.row, self._row(image)]
        later = [i.span for i in self.images if i.row == image.row and i.offset >= image.span.stop]
        gaps = zip([image.span.stop, *(i.stop for i in later)], [*(i.start for i in later), len(sequence)], strict=True)
        return VisualTokens(
            features=image.features,
            hidden=sequence[image.span],
            sequence=sequence,
            span=image.span,
            question=torch.cat([torch.arange(start, stop, device=hidden.device) for start, stop in gaps]),
            ordinal=image.ordinal,
            grid=image.grid,
            key=image.key,
            attention=self._attention(image) if stage.pruner.uses_attention else None,
            vision=image.vision,
            encode=None if stage.layer else image.encode,
        )

    def _row(self, image: ImageTokens) -> slice:
        """Where the image's row has its valid tokens in the current sequence."""
        lengths = self.lengths if self.sequence is None else self.sequence.lengths
        first = image.start - image.offset
        return slice(first, first + lengths[image.row])

    def _attention(self, image: ImageTokens) -> Attention:
        """The layer before's queries and keys, of the image's row without its padding."""
        assert self.attention is not None and self.rotary is not None
        query, key, scaling = self.attention
        row = self._row(image)
        now = slice(key.shape[2] - query.shape[2], None)  # without what was cached before
        cos, sin = (x.expand(self.batch, -1, -1)[image.row, row] for x in self.rotary)
        return Attention(query[image.row, :, row], key[image.row, :, now][:, row], cos, sin, scaling, image.span)

    def _shorten(self, kept: Tensor, dropped: list[int], hidden: Tensor) -> Tensor:
        now = self.lengths if self.sequence is None else self.sequence.lengths
        lengths = [length - less for length, less in zip(now, dropped, strict=True)]
        places = torch.arange(hidden.shape[1], device=hidden.device)
        valid = self._valid(self.length).bool() if self.sequence is None else self.sequence.source >= 0
        # Sorting moves every kept place to the right in its order and the -1 of all others to the left: padding.
        local = torch.where(kept & valid, places, -1).sort(dim=1).values[:, -max(lengths) :]
        shorter = Sequence(local, lengths)
        hidden = shorter.gather(hidden)
        if self.sequence is not None:
            shorter = Sequence(torch.where(local < 0, -1, shorter.gather(self.sequence.source)), lengths)
        self.sequence = shorter
        return hidden

    def view(
        self, past: KeptIndex | None, stored: int, compact: bool, kwargs: dict[str, Any]
    ) -> tuple[KeptIndex, Tensor | None, tuple[Tensor, Tensor]]:
        """What a layer needs: the index of its cache after this forward, its mask, its rotary embeddings.

        Layers of one stage share `past` and the sequence, hence also the result.
        """
        key = (id(past), id(self.sequence))
        if key not in self._views:
            if self.mask is not None and (not isinstance(self.mask, Tensor) or self.mask.dim() != 2):
                raise CodebookError("pruning needs a 2-D attention mask (batch, length), as processors make it")
            index = self._extend(past, stored)
            made = (index, self._mask(index), self._rotary(past, compact, kwargs))
            self._views[key] = (past, self.sequence, made)  # both referenced, so that their ids stay theirs
        return self._views[key][2]

    def _extend(self, past: KeptIndex | None, stored: int) -> KeptIndex:
        device = self.embeds.device
        if past is None:  # an unpruned cache, or none
            columns, padded = torch.arange(stored, device=device).expand(self.batch, -1), False
            if self.mask is not None and stored:
                on = self.mask[:, :stored].bool()
                columns, padded = columns.masked_fill(~on, PAD), not bool(on.all())
            past = KeptIndex(columns, stored, torch.zeros(self.batch, dtype=torch.long, device=device), padded)
        places = torch.arange(self.length, device=device)
        if self.sequence is not None:
            source, padded, dropped = self.sequence.source, self.sequence.padded, self._dropped()
        else:
            on = self._valid(self.length).bool()
            # Decoding one token: it is valid, and asking the device would cost a sync at every step.
            padded = self.length > 1 and self.mask is not None and not bool(on.all())
            source, dropped = torch.where(on, places, -1), torch.zeros_like(past.dropped)
        own = torch.where(source < 0, PAD, past.logical + source)
        return KeptIndex(
            torch.cat([past.columns, own], dim=1),
            past.logical + self.length,
            past.dropped + dropped,
            past.padded or padded,
        )

    def _dropped(self) -> Tensor:
        assert self.sequence is not None
        less = [a - b for a, b in zip(self.lengths, self.sequence.lengths, strict=True)]
        return torch.tensor(less, device=self.embeds.device)

    def _mask(self, index: KeptIndex) -> Tensor | None:
        keys = index.columns
        queries = keys[:, -(self.length if self.sequence is None else self.sequence.source.shape[1]) :]
        sdpa = self.lm.config._attn_implementation == "sdpa"
        whole = keys.shape == queries.shape and sdpa  # sdpa is then causal by itself
        if not index.padded and (queries.shape[1] == 1 or whole):
            return None
        seen = (keys[:, None, None] <= queries[:, None, :, None]) & (keys != PAD)[:, None, None]
        if sdpa:
            return seen
        low = torch.finfo(self.embeds.dtype).min
        return torch.zeros(seen.shape, dtype=self.embeds.dtype, device=seen.device).masked_fill(~seen, low)

    def _rotary(self, past: KeptIndex | None, compact: bool, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        sequence = self.sequence
        if not compact:
            embeddings = kwargs["position_embeddings"]
            cos, sin = embeddings
            return (cos, sin) if sequence is None else (sequence.gather(cos), sequence.gather(sin))
        positions = kwargs["position_ids"].expand(self.batch, -1)
        if past is not None:
            positions = positions - past.dropped[:, None]
        if sequence is not None:
            before = sequence.gather(self._valid(self.length).long().cumsum(1)) - 1
            left = torch.tensor([sequence.source.shape[1] - n for n in sequence.lengths], device=before.device)
            rank = torch.arange(sequence.source.shape[1], device=before.device) - left[:, None]
            positions = sequence.gather(positions) - (before - rank)
        return self.lm.rotary_emb(self.embeds, positions)

    def _valid(self, length: int) -> Tensor:
        """(B, length) of the input's own tokens: 1, or 0 for padding."""
        if self.mask is None:
            return torch.ones(self.batch, length, dtype=torch.long, device=self.embeds.device)
        return self.mask[:, -length:]

    def restore(self, hidden: Tensor) -> Tensor:
        """Scatter the decoder's output (B, P, d) back to the input's length; dropped places are zero."""
        assert self.sequence is not None
        places = self.sequence.source.where(self.sequence.source >= 0, self.length)[..., None].expand_as(hidden)
        full = hidden.new_zeros(self.batch, self.length + 1, hidden.shape[-1])
        return full.scatter(1, places, hidden)[:, :-1]


class Pruning:
    """The context in which a model's visual tokens are pruned by a schedule; made by calling the schedule.

    Attributes
    ----------
    kept : list[list[Tensor]]
        After a forward with images: for each image, in order of rows, the raster positions (int64) that survived each
        stage. For pictures and tests.
    """

    def __init__(self, model: Any, schedule: Schedule) -> None:
        self.model, self.schedule = model, schedule
        self.family = models.family(model)
        self.lm = model.get_decoder()
        schedule.check_layers(len(self.lm.layers))
        if (attention := self.lm.config._attn_implementation) not in ATTENTION:
            raise CodebookError(
                f"attention {attention!r} is not supported: load the model with attn_implementation='sdpa' or 'eager'"
            )
        if any(getattr(layer.self_attn, "sliding_window", None) for layer in self.lm.layers):
            raise CodebookError("decoders with sliding-window attention are not supported yet")
        self.stages = {stage.layer: stage for stage in schedule.stages}
        self.kept: list[list[Tensor]] = []
        self._signature = inspect.signature(model.base_model.forward)

    def __enter__(self) -> Pruning:
        if self.model in _active:
            raise CodebookError("the model is already being pruned: join the stages in one schedule instead of nesting")
        _active.add(self.model)
        self._inputs: dict[str, Any] | None = None
        self._forward: Forward | None = None
        self._encoded: Encoded | None = None
        with contextlib.ExitStack() as undo:
            undo.callback(_active.discard, self.model)
            for module, hook in (
                (self.family.tower(self.model), self._on_tower),
                (self.model.base_model, self._on_base),
                (self.lm, self._on_decoder),
                *((layer, partial(self._on_layer, i)) for i, layer in enumerate(self.lm.layers)),
            ):
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            undo.callback(self.lm.register_forward_hook(self._after_decoder).remove)
            for stage in self.schedule.stages:
                if stage.pruner.uses_attention:
                    undo.callback(tap(self.lm.layers[stage.layer - 1].self_attn, self._on_attention))
            if any(stage.pruner.uses_vision for stage in self.schedule.stages):
                undo.callback(tap(self.family.vision_attention(self.model), self._on_vision_attention))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._inputs = self._forward = self._encoded = None
        self._undo.close()

    def _on_tower(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._encoded = Encoded(args[0] if args else kwargs["pixel_values"])

    def _on_vision_attention(self, query: Tensor, key: Tensor, scaling: float) -> None:
        if self._encoded is not None:
            self._encoded.attention = query, key, scaling

    def _on_base(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        encoded = (given.get("mm_encoder_outputs") or {}).values()
        images = given.get("pixel_values") is not None or any(e is not None for e in encoded)
        embeds = given.get("inputs_embeds")
        if given.get("input_ids") is None and (images or (embeds is not None and embeds.shape[1] > 1)):
            raise CodebookError("pass input_ids: from inputs_embeds alone the visual tokens cannot be found")
        self._inputs = given if images else None  # image tokens among generated ids are no images

    def _on_decoder(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:  # text alone, straight to the decoder: only shape and device matter
            ids = args[0] if args else kwargs["input_ids"]
            embeds = torch.empty(*ids.shape, 0, device=ids.device, dtype=self.model.dtype)
        self._forward = Forward(self.lm, embeds, kwargs.get("attention_mask"))
        if self._inputs is not None:
            if (isinstance(mask := self._forward.mask, Tensor) and mask.dim() != 2) or isinstance(mask, dict):
                raise CodebookError("pruning needs a 2-D attention mask and a DynamicCache: use neither 4-D masks nor "
                                    "a static cache")  # fmt: skip
            self._forward.find_images(self.family, self.model, self._inputs["input_ids"], self._encoded)
            self.kept = [[] for _ in self._forward.images]
            self._inputs = self._encoded = None

    def _on_layer(self, i: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self._forward
        if forward is None:
            return None
        hidden = args[0]
        if i in self.stages and forward.images:
            hidden = forward.prune(self.stages[i], hidden)
            forward.attention = None
            for log, image in zip(self.kept, forward.images, strict=True):
                log.append(image.ordinal)
        cache = kwargs.get("past_key_values")
        entry = cache.layers[i] if cache is not None and i < len(cache.layers) else None
        past = entry.index if isinstance(entry, PrunedLayer) else None
        if forward.sequence is None and past is None:
            forward.rotary = kwargs["position_embeddings"]
            return None
        pruned = None if cache is None else pruned_layer(cache, i)
        stored = 0 if pruned is None else pruned.physical
        index, mask, rotary = forward.view(past, stored, self.schedule.positions == "compact", kwargs)
        if pruned is not None:
            pruned.index = index
        forward.rotary = rotary
        changed = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
        return (hidden, *args[1:]), kwargs | changed

    def _on_attention(self, query: Tensor, key: Tensor, scaling: float) -> None:
        if self._forward is not None and self._forward.images:
            self._forward.attention = query, key, scaling

    def _after_decoder(self, _: Any, args: tuple[Any, ...], output: Any) -> Any:
        # A stage may have encoded an image anew: that pass of the tower is no prompt's.
        forward, self._forward, self._encoded = self._forward, None, None
        if forward is None or forward.sequence is None:
            return None
        if isinstance(output, tuple):
            return (forward.restore(output[0]), *output[1:])
        output.last_hidden_state = forward.restore(output.last_hidden_state)
        return output


def _by_row(encoded: int, per_row: list[int]) -> list[list[int]] | None:
    """Which encoded image each row's are; beams and `num_return_sequences` repeat whole rows after the encoding."""
    total = sum(per_row)
    if not encoded or total % encoded:
        return None
    repeats, out, start = total // encoded, [], 0
    for row, count in enumerate(per_row):
        out.append(list(range(start, start + count)))
        start += count if row % repeats == repeats - 1 else 0
    return out
