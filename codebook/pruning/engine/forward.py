"""One forward pass, shortened as it goes: which tokens are left, and what each layer needs to know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codebook import models
from codebook.errors import CodebookError
from codebook.models import Encoded
from codebook.pruning.attention import Attention, PackedVision, Tower, Vision
from codebook.pruning.engine.cache import PAD, KeptIndex, visible
from codebook.pruning.methods.base import FeaturePruner, Pruner, nearest_kept
from codebook.pruning.stage import Stage
from codebook.pruning.tokens import VisualTokens, digest_rows, mix
from codebook.store.spread import spread


@dataclass(frozen=True)
class Unit:
    """Visual tokens that a pruner sees together, and what is left of them: one grid of an image, or all of its grids.

    `image` counts the forward's images; `columns` (n,) int64 are its tokens' places in the forward's input, in `row`,
    and `text` (T,) int64 those of the text after the image; its tokens begin at `offset` among the image's visual
    tokens. `mass` (n,) int64 is how many tokens each stands for, None where each stands for itself. The rest is as in
    `VisualTokens`.
    """

    image: int
    row: int
    columns: Tensor
    text: Tensor
    offset: int
    grid: tuple[int, int]
    ordinal: Tensor
    key: Tensor
    features: Tensor
    vision: PackedVision | None
    encode: Callable[[int, int], Tensor] | None
    mass: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.ordinal)


@dataclass(frozen=True)
class Sequence:
    """What is left of a forward's input.

    `source` (B, P) int64 are places in it, -1 for padding, always on the left. `bias` (B, P) is as in `KeptIndex`.
    """

    source: Tensor
    lengths: list[int]
    bias: Tensor | None = None

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.source.shape[1]

    def gather(self, x: Tensor) -> Tensor:
        """This sequence's entries of (B or 1, L, ...); those of the padding are arbitrary."""
        index = self.source.clamp(min=0).view(*self.source.shape, *[1] * (x.dim() - 2))
        return x.expand(len(self.source), *x.shape[1:]).gather(1, index.expand(*self.source.shape, *x.shape[2:]))


class Forward:
    """One forward pass through the decoder, pruned as it goes."""

    def __init__(self, family: models.Family, model: Any, embeds: Tensor, mask: Any) -> None:
        self.family, self.model, self.embeds, self.mask = family, model, embeds, mask
        self.batch, self.length = embeds.shape[:2]
        self.blocks: Tensor | None = None
        self.images: list[models.Image] = []
        self.units: list[Unit] = []
        self.portions: list[float] = []
        self.sequence: Sequence | None = None
        self.attention: tuple[Tensor, Tensor, float] | None = None
        self.layer_before: tuple[Any, tuple[Tensor, Tensor]] | None = None
        self._views: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def check_mask(self) -> None:
        if self.mask is not None and (not isinstance(self.mask, Tensor) or self.mask.dim() != 2):
            raise CodebookError("pruning needs a 2-D attention mask (batch, length), as processors make it, and a "
                                "DynamicCache: use neither 4-D masks nor a static cache")  # fmt: skip

    def find_images(
        self, input_ids: Tensor, encoded: dict[str, Encoded | None], shared: bool, usual: float | None = None
    ) -> None:
        """Locate the prompt's images; the one place where the host waits for token ids, padding and spreads."""
        ids, on = input_ids.tolist(), self._valid(self.length).tolist()
        device = self.embeds.device
        visual = {self.family.token(self.model, kind) for kind in encoded}
        towers = {kind: self._tower(call) for kind, call in encoded.items()}
        pixels = {
            kind: None if call is None else self.family.pixels(self.model, call) for kind, call in encoded.items()
        }
        digests = {
            kind: torch.stack([digest_rows(image[None])[0] for image in images]).to(device)
            for kind, images in pixels.items()
            if images is not None
        }
        valid = [[i for i, value in enumerate(row) if value] for row in on]
        self.lengths = [len(columns) for columns in valid]
        self.columns = [torch.tensor(columns, device=device) for columns in valid]
        for row, images in enumerate(self.family.images(self.model, ids, encoded)):
            if images and ids[row][valid[row][-1]] in visual:
                raise CodebookError("a prompt ends with its visual tokens: put text after the image")
            for place, image in enumerate(images):
                if not all(on[row][column] for column in image.columns):
                    raise CodebookError("the attention mask hides visual tokens: unmask them, or prune them instead")
                columns = torch.tensor(image.columns, device=device)
                text = [i for i in valid[row] if i > image.columns[-1] and ids[row][i] not in visual]
                after, features = torch.tensor(text, device=device), self.embeds[row, columns]
                own, tower, pieces = pixels[image.kind], towers[image.kind], image.sources
                if own is None or pieces is None:  # encoded beforehand: neither pixels nor tower were seen
                    digest, encode = digest_rows(features[None])[0], None
                else:
                    parts = digests[image.kind][list(pieces)]
                    digest = parts[0] if len(pieces) == 1 else digest_rows(parts[None])[0]
                    encode = partial(self.family.encode, self.model, own[pieces[0]])
                offset = 0
                for number, (grid, index) in enumerate(image.units(shared)):
                    index = index.to(device)
                    self.units.append(
                        Unit(
                            image=len(self.images),
                            row=row,
                            columns=columns[index],
                            text=after,
                            offset=offset,
                            grid=grid,
                            ordinal=torch.arange(len(index), device=device),
                            key=mix(digest + place) ^ mix(torch.tensor(number, device=device)),
                            features=features[index],
                            vision=None if tower is None else PackedVision(tower, pieces or (), index),
                            encode=encode,
                        )
                    )
                    offset += len(index)
                self.images.append(image)
        if usual is not None and self.units:
            self._portion(usual)

    def _portion(self, usual: float) -> None:
        """How much of what the stages say each image keeps: `Schedule.spread`."""
        spreads = torch.stack([spread(unit.features) for unit in self.units]).tolist()
        for number in range(len(self.images)):
            own = [value for unit, value in zip(self.units, spreads, strict=True) if unit.image == number]
            self.portions.append(min(2.0, max(0.5, sum(own) / len(own) / usual)))

    def _tower(self, call: Encoded | None) -> Tower | None:
        if call is None or not call.attention:
            return None
        has_cls = self.family.has_cls(self.model)
        parts = [
            Vision(query[i], key[i], scaling, has_cls)
            for query, key, scaling in call.attention
            for i in range(len(key))
        ]
        return Tower(parts, partial(self.family.pack, self.model, call))

    def prune(self, stage: Stage, hidden: Tensor) -> Tensor:
        """Apply a stage to the input (B, P, d) of its layer; return what is left of it."""
        kept = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        units, merged, dropped = [], [], [0] * self.batch
        targets = self._targets(stage)
        together = self._together(stage.pruner, targets)
        for number, (unit, target) in enumerate(zip(self.units, targets, strict=True)):
            index, values = together.get(number), None
            if unit.count:
                if index is None:
                    index, values = self._choose(stage, unit, target, hidden)
                if index is not None:
                    places = self._places(unit.row, unit.columns)
                    kept[unit.row, places] = False
                    kept[unit.row, places[index]] = True
                    dropped[unit.row] += unit.count - len(index)
                    features = unit.features[index] if values is None or stage.layer else values
                    unit = replace(
                        unit,
                        columns=unit.columns[index],
                        ordinal=unit.ordinal[index],
                        features=features,
                        mass=_mass(stage, unit, index, hidden[unit.row, places]),
                    )
            units.append(unit)
            merged.append(values)
        self.units = units
        if any(dropped):
            hidden = self._shorten(kept, dropped, hidden)
            for unit, values in zip(units, merged, strict=True):
                if values is not None:
                    hidden[unit.row, self._places(unit.row, unit.columns)] = values
            self._weigh()
        return hidden

    def _weigh(self) -> None:
        """Note in the sequence what its tokens stand for."""
        assert self.sequence is not None
        units = [(unit, unit.mass) for unit in self.units if unit.mass is not None and unit.count]
        if units:
            bias = torch.zeros(self.sequence.source.shape, device=self.embeds.device)
            for unit, mass in units:
                bias[unit.row, self._places(unit.row, unit.columns)] = mass.log()
            self.sequence = replace(self.sequence, bias=bias)

    @property
    def kept(self) -> list[Tensor]:
        """For each image, which of its visual tokens are left."""
        return [
            torch.cat([unit.offset + unit.ordinal for unit in self.units if unit.image == image])
            for image in range(len(self.images))
        ]

    def _targets(self, stage: Stage) -> list[int | None]:
        """How many tokens of each unit stay: an image's quota is divided by what its units still have."""
        if stage.keep is None:
            return [None] * len(self.units)
        out: list[int | None] = []
        for number, image in enumerate(self.images):
            now = [unit.count for unit in self.units if unit.image == number]
            target = stage.count(image.count)
            if self.portions and target:
                target = min(image.count, max(1, round(target * self.portions[number])))
            if target > sum(now) and any(now):
                raise CodebookError(
                    f"the stage at layer {stage.layer} keeps {target} visual tokens, but only {sum(now)} are left"
                )
            out += divided(min(target, sum(now)), now)
        return out

    def _together(self, pruner: Pruner, targets: list[int | None]) -> dict[int, Tensor]:
        """What stays of the units for which a pruner can choose at once, those of as many tokens that keep as many."""
        if not isinstance(pruner, FeaturePruner):
            return {}
        alike: dict[tuple[int, int], list[int]] = {}
        for number, (unit, target) in enumerate(zip(self.units, targets, strict=True)):
            if target and target < unit.count:
                alike.setdefault((unit.count, target), []).append(number)
        chosen: dict[int, Tensor] = {}
        for (_, keep), numbers in alike.items():
            features = torch.stack([self.units[number].features for number in numbers])
            for number, index in zip(numbers, pruner.select_each(features, keep), strict=True):
                chosen[number] = _checked(pruner, index, keep)
        return chosen

    def _choose(
        self, stage: Stage, unit: Unit, target: int | None, hidden: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Indices of a unit's tokens that stay and their new values; None for all, and for unchanged ones."""
        pruner = stage.pruner
        if target == 0:
            return unit.ordinal[:0], None
        if target == unit.count:
            return None, None
        tokens = self._tokens(stage, unit, hidden)
        index = _checked(pruner, pruner.choose(tokens) if target is None else pruner.select(tokens, target), target)
        if len(index) == unit.count:
            return None, None
        return index, pruner.merge(tokens, index)

    def _tokens(self, stage: Stage, unit: Unit, hidden: Tensor) -> VisualTokens:
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
            key=unit.key,
            attention=self._attention(unit, span) if stage.pruner.uses_attention else None,
            vision=unit.vision,
            encode=None if stage.layer else unit.encode,
        )

    def _row(self, row: int) -> tuple[Tensor, Tensor | slice]:
        """A row's tokens without padding: their columns in the input, ascending, and their places in the sequence."""
        if self.sequence is None:
            return self.columns[row], self.columns[row]
        own = slice(-self.sequence.lengths[row], None)
        return self.sequence.source[row, own], own

    def _places(self, row: int, columns: Tensor) -> Tensor:
        """Where columns of the input, all still there, are in the sequence."""
        return columns if self.sequence is None else torch.searchsorted(self.sequence.source[row], columns)

    def _attention(self, unit: Unit, span: Tensor) -> Attention:
        """The layer before's queries and keys, of the unit's row without its padding."""
        assert self.attention is not None and self.layer_before is not None
        query, key, scaling = self.attention
        layer, rotary = self.layer_before
        columns, row = self._row(unit.row)
        now = slice(key.shape[2] - query.shape[2], None)  # without what was cached before
        cos, sin = (x.expand(self.batch, -1, -1)[unit.row, row] for x in rotary)
        blocks = None if self.blocks is None else self.blocks[unit.row, columns]
        bias = None if self.sequence is None or self.sequence.bias is None else self.sequence.bias[unit.row, row]

        def sees(places: Tensor) -> Tensor:
            both = None if blocks is None else (blocks[places], blocks)
            return visible(columns[places], columns, window(layer), both, self.family.window_last)

        return Attention(query[unit.row, :, row], key[unit.row, :, now][:, row], cos, sin, scaling, span, sees, bias)

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
        self, layer: Any, past: KeptIndex | None, cached: tuple[int, int], compact: bool, kwargs: dict[str, Any]
    ) -> tuple[KeptIndex, Tensor | None, tuple[Tensor, Tensor]]:
        """What a layer needs: the index of its cache after this forward, its mask, its rotary embeddings.

        `cached` is the logical length of its cache so far, and how many keys that stores. Layers of one stage and kind
        share all this, hence also the result.
        """
        positions = kwargs["position_embeddings"]
        key = (id(past), cached, id(self.sequence), window(layer), id(positions))
        if key not in self._views:
            self.check_mask()
            index = self._extend(past, cached)
            made = (index, self._mask(index, window(layer)), self._rotary(layer, past, compact, kwargs))
            self._views[key] = (past, self.sequence, positions, made)  # referenced, so that their ids stay theirs
        return self._views[key][-1]

    def _extend(self, past: KeptIndex | None, cached: tuple[int, int]) -> KeptIndex:
        device = self.embeds.device
        if past is None:  # an unpruned cache, or none
            logical, stored = cached
            columns, padded = torch.arange(logical - stored, logical, device=device).expand(self.batch, -1), False
            if self.mask is not None and stored:
                on = self.mask[:, logical - stored : logical].bool()
                columns, padded = columns.masked_fill(~on, PAD), not bool(on.all())
            past = KeptIndex(columns, logical, torch.zeros(self.batch, dtype=torch.long, device=device), padded)
        places = torch.arange(self.length, device=device)
        if self.sequence is not None:
            source, padded, dropped = self.sequence.source, self.sequence.padded, self._dropped()
            bias = self.sequence.bias
        else:
            on = self._valid(self.length).bool()
            # Decoding one token: it is valid, and asking the device would cost a sync at every step.
            padded = self.length > 1 and self.mask is not None and not bool(on.all())
            source, dropped, bias = torch.where(on, places, -1), torch.zeros_like(past.dropped), None
        own = torch.where(source < 0, PAD, past.logical + source)
        if bias is not None or past.bias is not None:
            bias = torch.cat([_or_zeros(past.bias, past.columns), _or_zeros(bias, own)], dim=1)
        return KeptIndex(
            torch.cat([past.columns, own], dim=1),
            past.logical + self.length,
            past.dropped + dropped,
            past.padded or padded,
            bias,
        )

    def _dropped(self) -> Tensor:
        assert self.sequence is not None
        less = [a - b for a, b in zip(self.lengths, self.sequence.lengths, strict=True)]
        return torch.tensor(less, device=self.embeds.device)

    def _mask(self, index: KeptIndex, window: int | None) -> Tensor | None:
        keys, blocks = index.columns, self.blocks
        queries = keys[:, -(self.length if self.sequence is None else self.sequence.source.shape[1]) :]
        window = None if window is None or index.logical <= window else window
        sdpa = self.model.get_decoder().config._attn_implementation == "sdpa"
        whole = keys.shape == queries.shape and sdpa  # sdpa is then causal by itself
        plain = not index.padded and window is None and blocks is None and index.bias is None
        if plain and (queries.shape[1] == 1 or whole):
            return None
        both = None
        if blocks is not None:
            mine = blocks if self.sequence is None else self.sequence.gather(blocks)
            both = mine, torch.cat([mine.new_full((len(keys), keys.shape[1] - mine.shape[1]), -1), mine], dim=1)
        seen = visible(queries, keys, window, both, self.family.window_last)[:, None]
        if sdpa and index.bias is None:
            return seen
        bias = _or_zeros(index.bias, keys).to(self.embeds.dtype)[:, None, None]
        return torch.where(seen, bias, torch.finfo(bias.dtype).min)

    def _rotary(
        self, layer: Any, past: KeptIndex | None, compact: bool, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        sequence = self.sequence
        if not compact:
            cos, sin = kwargs["position_embeddings"]
            return (cos, sin) if sequence is None else (sequence.gather(cos), sequence.gather(sin))
        positions = kwargs["position_ids"].expand(self.batch, -1)
        if past is not None:
            positions = positions - past.dropped[:, None]
        if sequence is not None:
            before = sequence.gather(self._valid(self.length).long().cumsum(1)) - 1
            left = torch.tensor([sequence.source.shape[1] - n for n in sequence.lengths], device=before.device)
            rank = torch.arange(sequence.source.shape[1], device=before.device) - left[:, None]
            positions = sequence.gather(positions) - (before - rank)
        return self.family.rotary(self.model, self.embeds, positions, layer)

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


def _or_zeros(bias: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros(like.shape, device=like.device) if bias is None else bias


def _checked(pruner: Pruner, index: Tensor, target: int | None) -> Tensor:
    if index.shape != (target or len(index),) or not len(index):
        wanted = "at least one was" if target is None else f"{target} were"
        raise CodebookError(f"{type(pruner).__name__} chose {tuple(index.shape)} tokens where {wanted} asked for")
    return index


def _mass(stage: Stage, unit: Unit, index: Tensor, hidden: Tensor) -> Tensor | None:
    """How many tokens each of those that stay of a unit stands for, from the hidden states (n, d) of all."""
    if not stage.mass or not len(index):  # of a crop or frame that loses everything, none stays to stand for it
        return None if unit.mass is None else unit.mass[index]
    mass = torch.ones_like(unit.ordinal) if unit.mass is None else unit.mass
    return mass.new_zeros(len(index)).index_add(0, nearest_kept(hidden, index), mass)


def window(layer: Any) -> int | None:
    """How far back a decoder layer looks, if not to the beginning."""
    attention = layer.self_attn
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    # Where the attention does not know, all layers are alike.
    return None if getattr(attention.config, "layer_types", None) else getattr(attention.config, "sliding_window", None)


def divided(total: int, among: list[int]) -> list[int]:
    """A number divided in proportion, largest remainders rounded up: no share is more than what it is a share of."""
    if not total:
        return [0] * len(among)
    whole = sum(among)
    shares = [total * part // whole for part in among]
    order = sorted(range(len(among)), key=lambda i: (-(total * among[i] % whole), i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares
