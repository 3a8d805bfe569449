"""How the visual tokens of images and videos are laid out in a prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from codebook.errors import CodebookError, counted

WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0)
"""Box of a view of the whole picture."""

KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Kinds of what a prompt can show, and the argument that holds the pixels of each."""


@dataclass(frozen=True)
class Grid:
    """A rectangle of an image's visual tokens, in raster order: its whole view, one crop of it, or a video's frame.

    Attributes
    ----------
    start
        Place of its first token among the image's tokens in the prompt.
    rows, cols
        Visual tokens down and across.
    kind
        `view` (of the whole image), `crop` or `frame`.
    stride
        Tokens from one row to the next; more than `cols` where structural tokens, such as newlines, end the rows.
    box
        The part of the picture that it shows: left, top, right, bottom as fractions; None where that is not known.
    """

    start: int
    rows: int
    cols: int
    kind: Literal["view", "crop", "frame"] = "view"
    stride: int = 0
    box: tuple[float, float, float, float] | None = WHOLE_PICTURE

    @property
    def count(self) -> int:
        """Number of its tokens."""
        return self.rows * self.cols

    @property
    def index(self) -> Tensor:
        """(count,) int64: places of its tokens among the image's, in raster order."""
        rows = torch.arange(self.rows)[:, None] * (self.stride or self.cols)
        return (self.start + rows + torch.arange(self.cols)).flatten()


@dataclass(frozen=True)
class Layout:
    """How the tokens of one image or video are laid out in a prompt.

    Attributes
    ----------
    length
        Tokens in the prompt, structural ones such as newlines included: those are in no grid and always kept.
    grids
        The visual tokens, in order.
    pieces
        How many encoded pieces it is made of: `Family.pixels` has one tensor, and `Family.pack` one result, per piece.
    """

    length: int
    grids: tuple[Grid, ...]
    pieces: int = 1

    @property
    def count(self) -> int:
        """Visual tokens, structural ones not counted."""
        return sum(grid.count for grid in self.grids)

    @property
    def whole(self) -> int:
        """Number of the grid of the whole view; 0, the first, where there is none, as in a video."""
        return next((i for i, grid in enumerate(self.grids) if grid.kind == "view"), 0)

    @classmethod
    def stacked(cls, count: int, rows: int, cols: int, kind: Literal["view", "crop", "frame"], tail: int = 0) -> Layout:
        """The layout of `count` grids of one shape, one after the other, and `tail` structural tokens."""
        box = None if kind == "crop" else WHOLE_PICTURE
        grids = [Grid(i * rows * cols, rows, cols, kind, box=box) for i in range(count)]
        return cls(count * rows * cols + tail, tuple(grids))


@dataclass(frozen=True)
class Image:
    """One image or video found in a prompt.

    Attributes
    ----------
    kind
        `image` or `video`.
    layout
        The layout of its tokens.
    columns
        Their places in the prompt, structural tokens included, ascending.
    sources
        The pieces of the encoding call that it is made of; None if that call was not seen.
    """

    kind: str
    layout: Layout
    columns: tuple[int, ...]
    sources: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        shapes = [f"{grid.kind} {grid.rows} x {grid.cols}" for grid in self.layout.grids]
        grids = ", ".join(
            f"{number} x {name}" if number > 1 else name
            for name, group in groupby(shapes)
            for number in [len(list(group))]
        )
        return f"<{self.kind} of {counted(self.count, 'visual token')}: {grids}>"

    @property
    def count(self) -> int:
        """Visual tokens, structural ones not counted."""
        return self.layout.count

    def locate(self, token: int) -> tuple[int, int, int]:
        """The grid, row and column of a visual token, named by its place among the image's (0 to `count - 1`)."""
        for i, grid in enumerate(self.layout.grids):
            if token < grid.count:
                return i, *divmod(token, grid.cols)
            token -= grid.count
        raise IndexError(f"the image has no visual token {token + self.count}")

    def view(self, tokens: Iterable[int]) -> tuple[list[int], tuple[int, int]]:
        """Which of these tokens lie in the whole view (for a video, the first frame), as raster positions, and that
        grid's rows and columns."""
        number = self.layout.whole
        grid = self.layout.grids[number]
        places = [self.locate(token) for token in tokens]
        return [row * grid.cols + col for i, row, col in places if i == number], (grid.rows, grid.cols)

    def units(self, shared: bool) -> list[tuple[tuple[int, int], Tensor]]:
        """The parts that are pruned at once: rows and columns, and places (n,) int64 among the image's tokens.

        Parameters
        ----------
        shared
            Whether all grids share one budget; else each has its own.

        Raises
        ------
        CodebookError
            If grids of different shapes are to share one budget.
        """
        grids = self.layout.grids
        if not shared or len(grids) == 1:
            return [((grid.rows, grid.cols), grid.index) for grid in grids]
        if len({(grid.rows, grid.cols) for grid in grids}) > 1:
            shapes = ", ".join(f"{grid.rows} x {grid.cols}" for grid in grids[:4])
            raise CodebookError(f"grids of {shapes} tokens cannot share one budget: use quotas='each'")
        return [((len(grids) * grids[0].rows, grids[0].cols), torch.cat([grid.index for grid in grids]))]


def token_runs(ids: list[int], token: int) -> list[tuple[int, int]]:
    """Start and length of each run of a token in a prompt."""
    found, start = [], 0
    for value, group in groupby(ids):
        length = len(list(group))
        if value == token:
            found.append((start, length))
        start += length
    return found


def whole_images_error(kind: str, what: str) -> CodebookError:
    """The error for a prompt that does not hold the tokens of whole images."""
    return CodebookError(
        f"{what}: pass whole {kind}s in one forward (no chunked prefill, no truncated prompt), with their pixels"
    )


def images_per_run(ids: list[int], token: int, length: int, kind: str = "image") -> list[int]:
    """How many images of `length` tokens each run of a token in a prompt holds."""
    runs = [run for _, run in token_runs(ids, token)]
    for run in runs:
        if run % length:
            raise whole_images_error(kind, f"a run of {run} image tokens is not a multiple of {length}")
    return [run // length for run in runs]


def fixed_layouts(layout: Layout, prompts: list[list[int]], token: int) -> list[list[Layout]]:
    """The layouts of the images in each prompt, where all images have the same one."""
    return [[layout] * sum(images_per_run(ids, token, layout.length)) for ids in prompts]


def crops_and_view(count: int, grid: tuple[int, int], view: int = -1) -> Layout:
    """The layout of an image of `count` grids of one shape: its whole view, the last one or that number, and crops.

    How many crops make a row is not known.
    """
    crops = Layout.stacked(count, *grid, "crop")
    grids = list(crops.grids)
    grids[view] = replace(grids[view], kind="view", box=WHOLE_PICTURE)
    return replace(crops, grids=tuple(grids), pieces=count)


def broken_layouts(ids: list[int], token: int, grid: tuple[int, int], view_first: bool = False) -> list[Layout]:
    """The layouts of the images of a prompt, each of them crops and then its whole view, with one token between.

    Or the whole view comes first.
    """
    rows, cols = grid
    counts: list[int] = []
    after = -1
    for start, length in token_runs(ids, token):
        if length != rows * cols:
            raise whole_images_error("image", f"a run of {length} image tokens is not {rows * cols}")
        if counts and start - after == 1:
            counts[-1] += 1
        else:
            counts.append(1)
        after = start + length
    return [crops_and_view(count, grid, 0 if view_first else -1) for count in counts]


def tagged_layouts(ids: list[int], token: int, grid: tuple[int, int], rows_known: bool = False) -> list[Layout]:
    """The layouts of the images of a prompt, each of them crops and then its whole view, with text between.

    The whole view always follows the same tag token.

    Parameters
    ----------
    rows_known
        Whether two tokens of text between crops mean that they are of one row, and more of them that a row ends.
    """
    rows, cols = grid
    out: list[Layout] = []
    crops: list[tuple[int, int]] = []  # row and column of each crop of the image so far
    found, after = token_runs(ids, token), 0
    for start, length in found:
        if length != rows * cols or not start:
            raise whole_images_error("image", f"a run of {length} image tokens is not {rows * cols}")
        if ids[start - 1] == ids[found[-1][0] - 1]:
            out.append(_placed_crops(crops, grid) if rows_known else crops_and_view(len(crops) + 1, grid))
            crops = []
        else:
            crops.append(next_crop(crops, start - after))
        after = start + length
    return out


def _placed_crops(crops: list[tuple[int, int]], grid: tuple[int, int]) -> Layout:
    """As `crops_and_view`, of an image of which the row and column of each crop are known."""
    plain = crops_and_view(len(crops) + 1, grid)
    boxes = [*crop_boxes(crops), WHOLE_PICTURE]
    return replace(plain, grids=tuple(replace(own, box=box) for own, box in zip(plain.grids, boxes, strict=True)))


def next_crop(crops: list[tuple[int, int]], gap: int) -> tuple[int, int]:
    """Row and column of the crop that comes after these, behind `gap` tokens of text: more than two end a row."""
    if not crops:
        return 0, 0
    down, across = crops[-1]
    return (down, across + 1) if gap == 2 else (down + 1, 0)


def crop_boxes(crops: list[tuple[int, int]]) -> list[tuple[float, float, float, float]]:
    """The part of the picture that each crop shows, of crops at these rows and columns."""
    down, across = (max((place[axis] for place in crops), default=0) + 1 for axis in (0, 1))
    return [(x / across, y / down, (x + 1) / across, (y + 1) / down) for y, x in crops]


def layouts_per_row(kind: str, layouts: list[Layout], counts: list[int]) -> list[list[Layout]]:
    """The layouts of encoded images, distributed over rows that have room for `counts` tokens.

    Beams and `num_return_sequences` repeat whole rows after the encoding: each copy of a row gets the same images.
    """
    encoded, room = sum(layout.length for layout in layouts), sum(counts)
    if not encoded or room % encoded:
        raise whole_images_error(kind, f"{room} {kind} tokens in the prompt, where the encoded {kind}s have {encoded}")
    repeats, out, start = room // encoded, [], 0
    for row, count in enumerate(counts):
        mine, stop = [], start
        while count > 0 and stop < len(layouts):
            mine.append(layouts[stop])
            count, stop = count - layouts[stop].length, stop + 1
        if count:
            what = f"the {kind} tokens of prompt {row + 1} are not those of the encoded {kind}s"
            raise whole_images_error(kind, what)
        out.append(mine)
        start = stop if row % repeats == repeats - 1 else start
    return out


def pool_patches(values: Tensor, cols: int, size: int) -> Tensor:
    """Average squares of `size` x `size` patches, `cols` of them in a row: (N, D) to (N / size^2, D)."""
    cells = values.reshape(-1, size, cols // size, size, values.shape[-1])
    return cells.mean((1, 3)).flatten(0, 1)
