"""One forward pass, shortened as it goes: at each stage choose, note what the kept tokens stand for, shorten.

The pieces are pure: `prompt` finds the images, `selection` chooses, `sequence` shortens and restores, `views` makes
masks and positions. This is the one place that changes: which units and which sequence the next layer sees.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codebook.errors import CodebookError
from codebook.models import Family
from codebook.models.base import CACHE_NAMES, Model, chunk, window
from codebook.pruning.attention import Attention
from codebook.pruning.engine import selection
from codebook.pruning.engine.cache import visible
from codebook.pruning.engine.prompt import Prompt, Unit
from codebook.pruning.engine.sequence import Given, Shortened, shorten
from codebook.pruning.engine.statistics import Tally
from codebook.pruning.engine.tap import overhear
from codebook.pruning.engine.views import Cached, View, Viewer
from codebook.pruning.methods.base import Pruner
from codebook.pruning.stage import Stage
from codebook.pruning.text import DISTANCE
from codebook.pruning.tokens import VisualTokens


class Kept(NamedTuple):
    """Tokens that a stage chose to keep.

    Attributes
    ----------
    stays
        For each unit the indices that stay, (k,) int64; None for all.
    known
        For each unit what the pruner knows of its choice (`VisualTokens.known`).
    """

    stays: list[Tensor | None]
    known: list[dict[Any, Any]]


Chosen = dict[int, Kept]
"""By the layer of each stage: what a generation without cache repeats."""


class Forward:
    """One forward pass through the decoder, pruned as it goes.

    Parameters
    ----------
    given
        Its input.
    stages
        By their layers.
    prompt
        The images that it shows; None for text alone.
    blocks : (B, L) int64 or None
        As `Family.blocks` gives them.
    compact
        Whether positions are renumbered.
    chosen
        What an earlier forward of the same generation chose, and an attribute. Filled where it is empty.
    tally
        Where the time in which stages choose and merge is added up.

    Attributes
    ----------
    log : list[list[Tensor]]
        For each image what each stage so far has left of it, as in `Pruning.kept`.
    units
        What is left of the prompt's units.
    sequence
        What is left of the input; None while that is all of it.
    heard
        Queries, keys and scaling of the layer that a stage asks, while that stage is at work.
    asked
        That layer, and the rotary embeddings that it was given: the layer that ran last, or the stage's own.
    cached
        By layers that were shortened, what their caches held before this forward: others may reuse their keys.
    """

    def __init__(
        self,
        family: Family,
        model: Model,
        given: Given,
        stages: Mapping[int, Stage],
        prompt: Prompt | None = None,
        blocks: Tensor | None = None,
        compact: bool = False,
        chosen: Chosen | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.family, self.model = family, model
        self.given, self.stages, self.prompt, self.blocks = given, stages, prompt, blocks
        self.log: list[list[Tensor]] = [] if prompt is None else [[] for _ in prompt.images]
        self.units: list[Unit] = [] if prompt is None else list(prompt.units)
        self.sequence: Shortened | None = None
        self.heard: tuple[Tensor, Tensor, float] | None = None
        self.asked: tuple[Any, Any] | None = None
        self.cached: dict[int, Cached] = {}
        self.chosen: Chosen = {} if chosen is None else chosen
        self._tally = tally
        self._norm = family.last_norm(model)
        self._viewer = Viewer(family, model, given, [] if prompt is None else prompt.lengths, blocks, compact)
        self._views: list[tuple[tuple[Any, ...], View]] = []

    def asks_own_layer(self, layer: int) -> bool:
        """Whether the stage at this layer, if there is one, chooses by how this very layer attends."""
        return self.prompt is not None and layer in self.stages and self.stages[layer].pruner.own_layer

    def ask(self, layer: Any, hidden: Tensor, rotary: Any, kwargs: dict[str, Any]) -> None:
        """Have a layer say what it would attend with, were its input (B, P, d) left as it is; a tap hears it."""
        self.asked = layer, rotary
        own = {"position_embeddings": rotary, "attention_mask": None, **dict.fromkeys(kwargs.keys() & CACHE_NAMES)}
        overhear(layer.self_attn, hidden_states=self.family.attention_norm(layer)(hidden), **(kwargs | own))

    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        """What a layer gets of its input (B, P, d), once the stage at this layer, if there is one, has pruned it."""
        if self.prompt is None or layer not in self.stages:
            return hidden
        # Methods compute in float32, whatever the layers do: in half precision tokens that are alike are equal.
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, self.heard = self.prune(self.stages[layer], hidden), None
        for log, kept in zip(self.log, self.kept, strict=True):
            log.append(kept)
        return hidden

    def prune(self, stage: Stage, hidden: Tensor) -> Tensor:
        """Apply a stage to the input (B, P, d) of its layer; return what is left of it."""
        assert self.prompt is not None

        @cache
        def tokens(number: int) -> VisualTokens:
            return self._tokens(stage, self.units[number], hidden, known[number])

        chosen = self.chosen.get(stage.layer)
        known = [{} for _ in self.units] if chosen is None else chosen.known
        if chosen is None:
            films = any(own.joint for own in self.stages.values() if own.layer <= stage.layer)
            counts = selection.targets(stage, self.prompt.images, self.units, self.prompt.portions, films=films)
            with self._timing(), torch.no_grad():  # a choice has no gradient
                stays = selection.choose(stage.pruner, self.units, counts, tokens)
            chosen = self.chosen[stage.layer] = Kept(stays, known)

        kept = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        places = [self._places(unit.row, unit.columns) for unit in self.units]
        masses = selection.masses(stage, self.units, chosen.stays, hidden, places, tokens)
        merged, units, dropped = self._merged(stage, chosen.stays, tokens), list(self.units), [0] * self.given.batch
        for number, (unit, index, values) in enumerate(zip(self.units, chosen.stays, merged, strict=True)):
            if index is not None:
                # Filled and not assigned: a number assigned to places that a tensor names makes the host wait.
                kept[unit.row].index_fill_(0, places[number], False).index_fill_(0, places[number][index], True)
                dropped[unit.row] += unit.count - len(index)
                units[number] = replace(
                    unit,
                    columns=unit.columns[index],
                    ordinal=unit.ordinal[index],
                    # Before the LLM a merged value is what enters it; later it is a hidden state, and no feature.
                    features=unit.features[index] if values is None or stage.layer else values,
                    mass=masses[number],
                    distant=unit.distant or stage.mass == DISTANCE,
                )
        self.units = units
        return self._shortened(stage, kept, dropped, merged, hidden) if any(dropped) else hidden

    def _merged(
        self, stage: Stage, chosen: list[Tensor | None], tokens: Callable[[int], VisualTokens]
    ) -> list[Tensor | None]:
        """For each unit the new values of the tokens that stay; None where they stay as they are."""
        if type(stage.pruner).merge is Pruner.merge:
            return [None] * len(chosen)
        with self._timing():
            merged = [
                stage.pruner.merge(tokens(number), index) if index is not None and len(index) else None
                for number, index in enumerate(chosen)
            ]
        for number, (index, values) in enumerate(zip(chosen, merged, strict=True)):
            wanted = None if index is None else (len(index), tokens(number).hidden.shape[1])
            if values is not None and values.shape != wanted:
                raise CodebookError(
                    f"{type(stage.pruner).__name__} merges tokens to {tuple(values.shape)} values where {wanted} were "
                    "asked for"
                )
        return merged

    def _timing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._tally is None else self._tally.timing(self.given.device)

    def _shortened(
        self, stage: Stage, kept: Tensor, dropped: list[int], merged: list[Tensor | None], hidden: Tensor
    ) -> Tensor:
        assert self.prompt is not None
        lengths = self.prompt.lengths if self.sequence is None else self.sequence.lengths
        self.sequence, hidden = shorten(self.given, self.sequence, lengths, kept, dropped, hidden)
        for unit, values in zip(self.units, merged, strict=True):
            if values is not None:
                hidden[unit.row, self._places(unit.row, unit.columns)] = values
        self._weigh(stage)
        return hidden

    def _weigh(self, stage: Stage) -> None:
        """Have the sequence say what attention adds: for each kept token how many it stands for, 0 for text."""
        assert self.sequence is not None
        counted = [unit for unit in self.units if unit.mass is not None and unit.count]
        if not counted:
            return
        # Whatever the default dtype, float32 is what kernels take beside half precision.
        bias = torch.zeros(self.sequence.source.shape, dtype=torch.float32, device=self.given.device)
        first = torch.zeros_like(bias) if stage.layer == 0 and stage.mass == DISTANCE else None
        distant = torch.zeros_like(bias, dtype=torch.bool) if any(unit.distant for unit in counted) else None
        masses = torch.cat([unit.mass for unit in counted if unit.mass is not None]).float()
        sizes = [unit.count for unit in counted]
        for unit, mass, weight in zip(counted, masses.split(sizes), masses.log().split(sizes), strict=True):
            places = self._places(unit.row, unit.columns)
            bias[unit.row].index_copy_(0, places, weight)
            if first is not None:  # RESTORE's first layer takes all for equally large
                first[unit.row, places] = mass.mean().log().expand(unit.count)
            if distant is not None and unit.distant:
                distant[unit.row].index_fill_(0, places, True)
        self.sequence = replace(self.sequence, bias=bias, first=first, distant=distant)

    @property
    def kept(self) -> list[Tensor]:
        """For each image which of its visual tokens are left: (k,) int64, by their places among them."""
        images = () if self.prompt is None else self.prompt.images
        return [
            torch.cat([unit.offset + unit.ordinal for unit in self.units if unit.image == number])
            for number in range(len(images))
        ]

    def seen(self, layers: int) -> int:
        """How many visual tokens the decoder's layers have seen, summed over them; known on the host."""
        images = () if self.prompt is None else self.prompt.images
        bounds = [0, *sorted(self.stages), layers]
        spans = [after - before for before, after in pairwise(bounds)]
        counts = ([image.count, *map(len, log)] for image, log in zip(images, self.log, strict=True))
        return sum(span * count for own in counts for span, count in zip(spans, own, strict=True))

    def view(self, layer: Any, cached: Cached, count: int, kwargs: dict[str, Any]) -> View:
        """What a layer needs for the last `count` tokens of the sequence, which it is given, usually all.

        Layers of one stage and one kind share it, so it is made once for all of them.
        """
        check_mask(self.given.mask)
        # the very objects, not equal ones
        same = (cached.kept, self.sequence, kwargs["position_embeddings"], *self._viewer.weights(layer, self.sequence))
        sizes = (cached.logical, cached.stored, window(layer), chunk(layer), count)
        for (objects, numbers), view in self._views:
            if numbers == sizes and all(a is b for a, b in zip(objects, same, strict=True)):
                return view
        view = self._viewer.view(layer, cached, self.sequence, count, kwargs)
        self._views.insert(0, ((same, sizes), view))
        return view

    def restore(self, hidden: Tensor) -> Tensor:
        """The decoder's output (B, P, d) at the input's length, as `Shortened.restore` has it."""
        return hidden if self.sequence is None else self.sequence.restore(hidden, self.given.length)

    def _tokens(self, stage: Stage, unit: Unit, hidden: Tensor, known: dict[Any, Any]) -> VisualTokens:
        columns, row = self._row(unit.row)
        sequence, span = hidden[unit.row, row], torch.searchsorted(columns, unit.columns)
        return VisualTokens(
            features=unit.features,
            hidden=sequence[span],
            sequence=sequence,
            span=span,
            question=torch.searchsorted(columns, unit.text),
            ordinal=unit.ordinal,
            grid=unit.grid,
            key=unit.key(),
            attention=self._attention(unit, span) if stage.pruner.uses_attention else None,
            vision=unit.vision,
            whole=unit.whole,
            words=self.given.embeds[unit.row, unit.text],
            norm=self._norm,
            pixels=unit.pixels,
            encode=None if stage.layer else unit.encode,
            known=known,
        )

    def _row(self, row: int) -> tuple[Tensor, Tensor | slice]:
        """A row's tokens as pruners see them: their columns in the input, ascending, and their places in the sequence.

        Padding is on the left and what comes after the prompt on the right; neither is seen.
        """
        assert self.prompt is not None
        if self.sequence is None:
            return self.prompt.columns[row], self.prompt.columns[row]
        own = slice(-self.sequence.lengths[row], -self.given.extra or None)
        return self.sequence.source[row, own], own

    def _places(self, row: int, columns: Tensor) -> Tensor:
        """Where columns of the input, all still there, are in the sequence."""
        return columns if self.sequence is None else torch.searchsorted(self.sequence.source[row], columns)

    def _attention(self, unit: Unit, span: Tensor) -> Attention:
        """What the layer that the stage asks attends with, of the tokens that pruners see of the unit's row."""
        if self.heard is None or self.asked is None:
            raise CodebookError("the layer that the stage asks handed over no attention: load the model with "
                                "attn_implementation='sdpa' or 'eager', uncompiled")  # fmt: skip
        query, key, scaling = self.heard
        layer, rotary = self.asked
        columns, row = self._row(unit.row)
        now = slice(key.shape[2] - query.shape[2], None)  # without what was cached before
        cos, sin = (x.expand(self.given.batch, -1, -1)[unit.row, row] for x in self.family.rotary(rotary))
        own = self._viewer.blocks_of(layer)
        blocks = None if own is None else own[unit.row, columns]
        weights = self._viewer.weights(layer, self.sequence)
        bias, distant = (None if weight is None else weight[unit.row, row] for weight in weights)

        def sees(places: Tensor) -> Tensor:
            both = None if blocks is None else (blocks[places], blocks)
            since = self._viewer.since(layer, columns[places], unit.row)
            return visible(columns[places], columns, since, both, self.family.window_last)

        turned = self.family.turned(self.model, layer)
        heads = query[unit.row, :, row], key[unit.row, :, now][:, row]
        return Attention(*heads, cos, sin, scaling, span, sees, bias, turned, distant)


def check_mask(mask: object) -> None:
    """Raise a CodebookError for an attention mask that is not one number per token."""
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise CodebookError(
            "pruning needs a 2-D attention mask (batch, length), as processors make it, and a DynamicCache: use "
            "neither 4-D masks nor a static cache"
        )
