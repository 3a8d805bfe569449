"""The images of a forward's prompts, cut into the units that pruners see; found once, before the first layer."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from codebook.errors import CodebookError
from codebook.models import Encoded, Family, Image
from codebook.models.base import Model
from codebook.pruning.attention import PackedVision, Tower, Vision
from codebook.pruning.engine.sequence import Given
from codebook.pruning.tokens import digests, mix, on_device
from codebook.store.spread import spread


@dataclass(frozen=True)
class Unit:
    """Visual tokens that a pruner sees together, and what is left of them: one grid of an image, or all of its grids.

    Stages do not change a unit: they make a new one of what they keep.

    Attributes
    ----------
    image
        Number of its image among the forward's images.
    film
        Number of its film's first image: of a video its own, of the other images of a row the first such one. None
        where the image is cut into crops.
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
    distant
        Whether attention to them also rises with distance.
    grid, ordinal, features, whole, vision, encode, pixels
        As in `VisualTokens`.
    key
        Function that gives theirs.
    """

    image: int
    film: int | None
    row: int
    columns: Tensor
    text: Tensor
    offset: int
    grid: tuple[int, int]
    ordinal: Tensor
    key: Callable[[], Tensor]
    features: Tensor
    whole: Tensor
    vision: PackedVision | None
    encode: Callable[[int, int], Tensor] | None
    pixels: Tensor | None = None
    mass: Tensor | None = None
    distant: bool = False

    @property
    def count(self) -> int:
        """Number of its tokens."""
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
    sources = {kind: _Source.of(family, model, call) for kind, call in encoded.items()}
    found: list[_Found] = []
    for row, own in enumerate(family.images(model, ids, encoded)):
        words = [i for i in seen[row] if ids[row][i] not in visual] if own else []
        if own and ids[row][seen[row][-1]] in visual:
            raise CodebookError("a prompt ends with its visual tokens: put text after the image")
        for place, image in enumerate(own):
            if not all(map(on[row].__getitem__, image.columns)):
                raise CodebookError("the attention mask hides visual tokens: unmask them, or prune them instead")
            text = words[bisect.bisect(words, image.columns[-1]) :]
            found.append(_Found(image, row, place, text, image.units(shared)))
    sent = _sent([*seen, *(numbers for one in found for numbers in one.numbers)], given.device)
    columns = [next(sent) for _ in seen]
    units = _units(found, given, sources, sent)
    return Prompt(
        tuple(one.image for one in found),
        tuple(units),
        [len(columns) for columns in valid],
        columns,
        () if usual is None or not units else _portions(units, usual),
    )


class _Found(NamedTuple):
    """An image, its row of the batch, its place among the row's images, the columns of the text after it, its grids."""

    image: Image
    row: int
    place: int
    text: list[int]
    grids: list[tuple[tuple[int, int], Tensor]]

    @property
    def whole(self) -> bool:
        """Whether one grid has all of its tokens."""
        return len(self.grids) == 1 and len(self.grids[0][1]) == len(self.image.columns)

    @property
    def numbers(self) -> list[Sequence[int] | Tensor]:
        """What the device needs to know: the columns of image and text, and which of the former are in which grid."""
        return [self.image.columns, self.text, *([] if self.whole else [index for _, index in self.grids])]


def _sent(values: Sequence[Sequence[int] | Tensor], device: torch.device) -> Iterator[Tensor]:
    """Each of several lists of whole numbers on a device, all sent at once."""
    host = [torch.as_tensor(numbers, dtype=torch.int64) for numbers in values]
    return iter(on_device(torch.cat(host), device).split([len(numbers) for numbers in host]))


@dataclass(frozen=True)
class _Source:
    """What one call encoded: pixels, a tensor per piece, and the tower's attention if it was noted."""

    pixels: list[Tensor] | None
    tower: Tower | None
    encode: Callable[[Tensor, int, int], Tensor]

    @classmethod
    def of(cls, family: Family, model: Model, call: Encoded | None) -> _Source:
        encode = partial(family.encode, model)
        if call is None:
            return cls(None, None, encode)
        pixels = family.pixels(model, call)
        if not call.attention:
            return cls(pixels, None, encode)
        has_cls, whole = family.has_cls(model), slice(None)
        parts = [
            Vision(query[i, :, own], key[i, :, own], scaling, has_cls)
            for query, key, scaling in call.attention
            for i, own in family.attended(model, call) or [(i, whole) for i in range(len(key))]
        ]
        return cls(pixels, Tower(parts, partial(family.pack, model, call)), encode)

    @cached_property
    def digests(self) -> list[Tensor] | None:
        """Digest of each piece, () int64."""
        return None if self.pixels is None else digests(self.pixels)


def _units(found: list[_Found], given: Given, sources: dict[str, _Source], sent: Iterator[Tensor]) -> list[Unit]:
    """The units of the images, from the numbers that were sent of each."""
    features, columns, texts, indices = [], [], [], list[list[Tensor]]()
    for one in found:
        columns.append(next(sent))
        texts.append(next(sent))
        features.append(given.embeds[one.row, columns[-1]])
        if one.whole:
            indices.append([torch.arange(len(columns[-1]), device=given.device)])
        else:
            indices.append([next(sent) for _ in one.grids])
    # Few methods ask for keys, and they take more kernels than all else here: made when one is asked for.
    keys = cache(partial(_keys, found, features, sources, given.device))
    films, units = _film_numbers(found), []
    for number, one in enumerate(found):
        source, pieces, offset = sources[one.image.kind], one.image.sources, 0
        pixels = source.pixels[pieces[0]] if source.pixels and pieces else None
        encode = None if pixels is None else partial(source.encode, pixels)
        whole = one.whole and len(pieces or ()) == 1
        one_picture = whole and pixels is not None and pixels.dim() == 3 and len(pixels) == 3
        for i, ((grid, _), index) in enumerate(zip(one.grids, indices[number], strict=True)):
            own = features[number] if one.whole else features[number][index]
            units.append(
                Unit(
                    image=number,
                    film=films[number],
                    row=one.row,
                    columns=columns[number] if one.whole else columns[number][index],
                    text=texts[number],
                    offset=offset,
                    grid=grid,
                    ordinal=index if one.whole else torch.arange(len(index), device=given.device),
                    key=partial(_key, keys, number, _mixed(i)),
                    features=own,
                    whole=own,
                    vision=None if source.tower is None else PackedVision(source.tower, pieces or (), index),
                    encode=encode,
                    pixels=pixels if one_picture else None,
                )
            )
            offset += len(index)
    return units


def _film_numbers(found: list[_Found]) -> list[int | None]:
    """For each image the number of its film's first image, as `Unit` says."""
    films, first = list[int | None](), dict[int, int]()
    for number, one in enumerate(found):
        if one.image.kind == "video":
            films.append(number)
        else:
            films.append(None if len(one.image.layout.grids) > 1 else first.setdefault(one.row, number))
    return films


def _key(keys: Callable[[], Sequence[Tensor]], image: int, grid: int) -> Tensor:
    """The key, () int64, of an image and one of its grids, whose number is mixed."""
    return keys()[image] ^ grid


@cache
def _mixed(grid: int) -> int:
    return int(mix(torch.tensor(grid)))


def _keys(
    found: list[_Found], features: list[Tensor], sources: dict[str, _Source], device: torch.device
) -> Sequence[Tensor]:
    """For each image its key, () int64: of picture and place in the prompt, and of nothing that depends on the batch.

    With the place the same picture shown twice keeps two different random sets. There is one image at least. All go
    through each step together: one by one, a batch would take hundreds of kernels.
    """
    pictures, rest = list[Tensor | None](), list[Tensor]()
    for one, own in zip(found, features, strict=True):
        known, pieces = sources[one.image.kind].digests, one.image.sources
        if known is not None and pieces is not None and len(pieces) == 1:
            pictures.append(known[pieces[0]])
            continue
        pictures.append(None)
        # Encoded beforehand, no pixels were seen: the features stand for them.
        rest.append(own if known is None or pieces is None else torch.stack([known[piece] for piece in pieces]))
    others = iter(digests(rest))
    own = torch.stack([(next(others) if picture is None else picture).to(device) for picture in pictures])
    return mix(own + on_device([one.place for one in found], device)).unbind()


def _portions(units: list[Unit], usual: float) -> tuple[float, ...]:
    """For each image its grids' mean spread as a multiple of the usual one, from a half to two."""
    spreads = torch.stack([spread(unit.features) for unit in units]).tolist()
    own: dict[int, list[float]] = {}
    for unit, value in zip(units, spreads, strict=True):
        own.setdefault(unit.image, []).append(value)
    return tuple(min(2.0, max(0.5, sum(values) / len(values) / usual)) for _, values in sorted(own.items()))
