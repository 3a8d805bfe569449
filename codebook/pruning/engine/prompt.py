"""The images of a forward's prompts, cut into the units that pruners see; found once, before the first layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from codebook.errors import CodebookError
from codebook.models import Encoded, Family, Image
from codebook.models.base import Model
from codebook.pruning.attention import PackedVision, Tower, Vision
from codebook.pruning.engine.sequence import Given
from codebook.pruning.tokens import digest_rows, mix, on_device
from codebook.store.spread import spread


@dataclass(frozen=True)
class Unit:
    """Visual tokens that a pruner sees together, and what is left of them: one grid of an image, or all of its grids.

    Stages do not change a unit: they make a new one of what they keep.

    Attributes
    ----------
    image
        Number of its image among the forward's images.
    row
        Row of the batch.
    columns : (n,) int64
        Columns of its tokens in the forward's input.
    text : (T,) int64
        Columns of the prompt's text after the image.
    offset
        Where its tokens begin among the image's visual tokens.
    mass : (n,) int64 or None
        How many tokens each stands for; None where each stands for itself.
    grid, ordinal, key, features, vision, encode
        As in `VisualTokens`.
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
class Prompt:
    """Where everything is in the prompts of a forward's batch.

    Attributes
    ----------
    images : tuple[Image, ...]
        All images, row by row.
    units : tuple[Unit, ...]
        What pruners see of them, unpruned.
    lengths : list[int]
        Tokens of each row of the input, padding not counted.
    columns : list[Tensor]
        For each row the columns (int64) of its own tokens, as far as pruners see them: without padding, and without
        what comes after the prompt.
    portions : tuple[float, ...]
        For each image the factor by which its spread scales the stages' counts; empty where all keep the same.
    """

    images: tuple[Image, ...]
    units: tuple[Unit, ...]
    lengths: list[int]
    columns: list[Tensor]
    portions: tuple[float, ...] = ()


def find(
    family: Family,
    model: Model,
    given: Given,
    input_ids: Tensor,
    encoded: dict[str, Encoded | None],
    *,
    shared: bool,
    usual: float | None,
) -> Prompt:
    """Locate the prompts' images. The one place where the host waits for token ids, padding and spreads.

    Parameters
    ----------
    input_ids : (B, L) int64
    encoded
        For each kind that the prompts show, the call that encoded it; None if it was not seen.
    shared
        Whether the grids of an image share one quota (`Schedule.quotas`).
    usual
        Spread of an image that keeps what the stages say (`Schedule.spread`).

    Raises
    ------
    CodebookError
        If a prompt ends with an image, hides a part of one, or does not hold whole images.
    """
    ids, on = input_ids.tolist(), given.valid().tolist()
    end = given.length - given.extra
    valid = [[i for i, value in enumerate(row) if value] for row in on]
    seen = [[i for i in columns if i < end] for columns in valid]
    visual = {family.token(model, kind) for kind in encoded}
    sources = {kind: _Source.of(family, model, call, given.device) for kind, call in encoded.items()}
    images: list[Image] = []
    units: list[Unit] = []
    for row, own in enumerate(family.images(model, ids, encoded)):
        if own and ids[row][seen[row][-1]] in visual:
            raise CodebookError("a prompt ends with its visual tokens: put text after the image")
        for place, image in enumerate(own):
            if not all(on[row][column] for column in image.columns):
                raise CodebookError("the attention mask hides visual tokens: unmask them, or prune them instead")
            text = [i for i in seen[row] if i > image.columns[-1] and ids[row][i] not in visual]
            where = len(images), row, place
            units += _units(image, where, given, on_device(text, given.device), sources[image.kind], shared)
            images.append(image)
    return Prompt(
        tuple(images),
        tuple(units),
        [len(columns) for columns in valid],
        [on_device(columns, given.device) for columns in seen],
        () if usual is None or not units else _portions(units, usual),
    )


@dataclass(frozen=True)
class _Source:
    """What one call encoded: pixels and their digests, one per piece, and the tower's attention if it was noted."""

    pixels: list[Tensor] | None
    digests: list[Tensor] | None
    tower: Tower | None
    encode: Callable[[Tensor, int, int], Tensor]

    @classmethod
    def of(cls, family: Family, model: Model, call: Encoded | None, device: torch.device) -> _Source:
        encode = partial(family.encode, model)
        if call is None:
            return cls(None, None, None, encode)
        pixels = family.pixels(model, call)
        # Digests one by one: the piece of an image alone has the same as in any batch.
        digests = [digest_rows(piece[None])[0].to(device) for piece in pixels]
        if not call.attention:
            return cls(pixels, digests, None, encode)
        has_cls = family.has_cls(model)
        parts = [
            Vision(query[i], key[i], scaling, has_cls)
            for query, key, scaling in call.attention
            for i in range(len(key))
        ]
        return cls(pixels, digests, Tower(parts, partial(family.pack, model, call)), encode)


def _units(
    image: Image, where: tuple[int, int, int], given: Given, text: Tensor, source: _Source, shared: bool
) -> list[Unit]:
    number, row, place = where
    columns = on_device(image.columns, given.device)
    features, pieces = given.embeds[row, columns], image.sources
    if source.pixels is None or source.digests is None or pieces is None:  # encoded beforehand: no pixels were seen
        digest, encode = digest_rows(features[None])[0], None
    else:
        parts = [source.digests[piece] for piece in pieces]
        digest = parts[0] if len(parts) == 1 else digest_rows(torch.stack(parts)[None])[0]
        encode = partial(source.encode, source.pixels[pieces[0]])
    units, offset = [], 0
    for i, (grid, index) in enumerate(image.units(shared)):
        index = on_device(index, given.device)
        units.append(
            Unit(
                image=number,
                row=row,
                columns=columns[index],
                text=text,
                offset=offset,
                grid=grid,
                ordinal=torch.arange(len(index), device=given.device),
                # The picture, its place in the prompt, the grid's place in it: nothing that depends on the batch. With
                # the place the same picture shown twice keeps two different random sets.
                key=mix(digest + place) ^ int(mix(torch.tensor(i))),
                features=features[index],
                vision=None if source.tower is None else PackedVision(source.tower, pieces or (), index),
                encode=encode,
            )
        )
        offset += len(index)
    return units


def _portions(units: list[Unit], usual: float) -> tuple[float, ...]:
    """For each image its grids' mean spread as a multiple of the usual one, from a half to two."""
    spreads = torch.stack([spread(unit.features) for unit in units]).tolist()
    own: dict[int, list[float]] = {}
    for unit, value in zip(units, spreads, strict=True):
        own.setdefault(unit.image, []).append(value)
    return tuple(min(2.0, max(0.5, sum(values) / len(values) / usual)) for _, values in sorted(own.items()))
