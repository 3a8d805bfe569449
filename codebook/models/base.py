"""What a model family has to tell the rest of the package."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from codebook.errors import CodebookError

WHOLE = (0.0, 0.0, 1.0, 1.0)
"""The box of a view of the whole picture."""

KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""What prompts can show, and the argument that holds its pixels."""

SAMPLED = 32
"""Weights sampled from each of tower and projector for the fingerprint."""


@dataclass(frozen=True)
class Grid:
    """A rectangle of an image's visual tokens, in raster order: its whole view, one crop of it, or a video's frame.

    Attributes
    ----------
    start
        Place of its first token among the image's tokens in the prompt.
    rows, cols
        Of visual tokens.
    kind
        `view` (of the whole image), `crop` or `frame`.
    stride
        Tokens from one row to the next; more than `cols` where structural tokens, such as newlines, end the rows.
    box
        What it shows of the picture: left, top, right, bottom as fractions; None where that cannot be known.
    """

    start: int
    rows: int
    cols: int
    kind: Literal["view", "crop", "frame"] = "view"
    stride: int = 0
    box: tuple[float, float, float, float] | None = WHOLE

    @property
    def count(self) -> int:
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
        The others, in order.
    pieces
        How many of what the model encodes it is made of: `Family.pixels` has one tensor, `Family.pack` one result each.
    """

    length: int
    grids: tuple[Grid, ...]
    pieces: int = 1

    @property
    def count(self) -> int:
        """Visual tokens, structural ones not counted."""
        return sum(grid.count for grid in self.grids)

    @classmethod
    def stacked(cls, count: int, rows: int, cols: int, kind: Literal["view", "crop", "frame"], tail: int = 0) -> Layout:
        """`count` grids of one shape one after the other, and `tail` structural tokens."""
        grids = [Grid(i * rows * cols, rows, cols, kind, box=None if kind == "crop" else WHOLE) for i in range(count)]
        return cls(count * rows * cols + tail, tuple(grids))


@dataclass(frozen=True)
class Image:
    """One image or video found in a prompt.

    Attributes
    ----------
    kind
        `image` or `video`.
    layout
        Of its tokens.
    columns
        Where they are in the prompt, structural ones included, ascending.
    sources
        Which of the pieces that were encoded in one call it is made of; None if that call was not seen.
    """

    kind: str
    layout: Layout
    columns: tuple[int, ...]
    sources: tuple[int, ...] | None = None

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
        """Of some visual tokens those of the whole view, or of the first frame: raster positions, rows and columns."""
        number, grid = next(
            ((i, grid) for i, grid in enumerate(self.layout.grids) if grid.kind == "view"), (0, self.layout.grids[0])
        )
        places = [self.locate(token) for token in tokens]
        return [row * grid.cols + col for i, row, col in places if i == number], (grid.rows, grid.cols)

    def units(self, shared: bool) -> list[tuple[tuple[int, int], Tensor]]:
        """What is pruned at once: rows and columns, and places (n,) int64 among the image's tokens in the prompt.

        Raises
        ------
        CodebookError
            If all grids are to share one budget, and have not the same shape.
        """
        grids = self.layout.grids
        if not shared or len(grids) == 1:
            return [((grid.rows, grid.cols), grid.index) for grid in grids]
        if len({(grid.rows, grid.cols) for grid in grids}) > 1:
            shapes = ", ".join(f"{grid.rows} x {grid.cols}" for grid in grids[:4])
            raise CodebookError(f"grids of {shapes} tokens cannot share one budget: use quotas='each'")
        return [((len(grids) * grids[0].rows, grids[0].cols), torch.cat([grid.index for grid in grids]))]


@dataclass(eq=False)
class Encoded:
    """One call of a model's `get_image_features` or `get_video_features`.

    Attributes
    ----------
    kind
        `image` or `video`.
    given
        The call's arguments, by name.
    output
        What it returned.
    attention
        What the tower's layer that feeds the projector attended with, if someone asked: queries and keys (B, heads, N,
        d) and their scaling, one entry a call of its attention function.
    shown
        Whether a forward has had it.
    """

    kind: str
    given: dict[str, Any]
    output: Any = None
    attention: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    shown: bool = False


class Family(ABC):
    """One model family, stateless; subclasses are registered in `codebook.models`."""

    name: str

    tower_rows: ClassVar[bool] = True
    """Whether the tower takes one row an image, crop or frame, and nothing else that depends on them."""

    axes: ClassVar[int] = 1
    """Axes of position ids; tokens of a family with several cannot be renumbered."""

    shares: ClassVar[bool] = True
    """Whether what comes first in a prompt is the same whatever follows, also where its positions are: its keys and
    values can then be shared between prompts."""

    one_view: ClassVar[dict[str, Any]] = {}
    """Arguments with which the processor shows an image as one view, without crops."""

    window_last: ClassVar[bool] = True
    """Whether a sliding window also cuts tokens off that see each other as one block."""

    def check(self, config: Any) -> Family:
        """Return self, or raise a CodebookError when this variant of the family is not supported."""
        return self

    def tower(self, model: Any) -> nn.Module:
        """The vision tower."""
        return model.base_model.vision_tower

    def projector(self, model: Any) -> nn.Module:
        """The module that maps tower features to the LLM's input space."""
        return model.base_model.multi_modal_projector

    @abstractmethod
    def vision_attention(self, model: Any) -> nn.Module:
        """The attention module of the tower's layer whose output feeds the projector."""

    def has_cls(self, model: Any) -> bool:
        """Whether the tower puts a [CLS] token before the patches."""
        return False

    @abstractmethod
    def grid(self, model: Any) -> tuple[int, int]:
        """Rows and columns of the view that a codebook is built from: a whole image, without crops."""

    @abstractmethod
    def layouts(self, model: Any, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        """The images, or videos, of each prompt of a batch.

        Parameters
        ----------
        kind
            `image` or `video`.
        prompts
            Token ids, one list a row.
        encoded
            The call that encoded them, if it was seen.

        Raises
        ------
        CodebookError
            If the tokens are not those of whole images.
        """

    def token(self, model: Any, kind: str) -> int:
        """The token id that stands in prompts for visual tokens of an `image` or `video`."""
        return int(getattr(model.config, f"{kind}_token_id"))

    def images(self, model: Any, prompts: list[list[int]], encoded: dict[str, Encoded | None]) -> list[list[Image]]:
        """The images and videos of each prompt, in order.

        Parameters
        ----------
        prompts
            Token ids, one list a row.
        encoded
            For each kind that the prompts show, the call that encoded it, if it was seen.
        """
        found: list[list[Image]] = [[] for _ in prompts]
        for kind, call in encoded.items():
            rows, visual = self.layouts(model, kind, prompts, call), self.token(model, kind)
            pieces = [sum(layout.pieces for layout in row) for row in rows]
            first = None if call is None else _first_pieces(kind, len(self.pixels(model, call)), pieces)
            for i, (ids, row) in enumerate(zip(prompts, rows, strict=True)):
                columns = [column for column, token in enumerate(ids) if token == visual]
                start, piece = 0, 0 if first is None else first[i]
                for layout in row:
                    stop, after = start + layout.length, piece + layout.pieces
                    sources = None if first is None else tuple(range(piece, after))
                    found[i].append(Image(kind, layout, tuple(columns[start:stop]), sources))
                    start, piece = stop, after
        return [sorted(row, key=lambda image: image.columns) for row in found]

    def unseen(self, kind: str) -> CodebookError:
        """The error of families whose images have various sizes, where the call that encoded them was not seen."""
        return CodebookError(
            f"{self.name} needs to see its {kind}s encoded to know their sizes: call get_{kind}_features inside the "
            f"pruning context, or pass {KINDS[kind]}"
        )

    def pixels(self, model: Any, encoded: Encoded) -> list[Tensor]:
        """What the call encoded, one tensor of pixels a piece, the same whatever else is in the batch."""
        return list(encoded.given["pixel_values"])

    def pack(self, model: Any, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        """Bring values of patches into the order of visual tokens, as the model does with its features.

        Parameters
        ----------
        values
            One (N, D) tensor a row of the tower or, where it has one row, an image's or frame's part of it.

        Returns
        -------
        One (n, D) tensor a piece: the average of each token's patches, zero for structural tokens
        """
        return values

    def blocks(self, model: Any, given: dict[str, Any]) -> Tensor | None:
        """Which of a forward's tokens see each other in both directions.

        Parameters
        ----------
        given
            Arguments of the base model's forward.

        Returns
        -------
        (B, L) int64, equal numbers for tokens of one block and -1 for causal ones; None if all are causal
        """
        return None

    def rotary(self, model: Any, embeds: Tensor, positions: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, P, d) of a decoder layer at other positions (B, P) int64."""
        return model.get_decoder().rotary_emb(embeds, positions)

    @contextlib.contextmanager
    def narrowed(self, model: Any, narrow: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """A context in which whatever else the decoder adds to its hidden states goes through `narrow`.

        Parameters
        ----------
        narrow
            Gathers (B, L, d) down to what is left of the sequence.
        """
        yield

    def view(self, processor: Any, picture: Any) -> Tensor:
        """Pixels of the whole view of a PIL picture, as `image_features` takes them."""
        return processor.image_processor(images=picture, return_tensors="pt", **self.one_view)["pixel_values"]

    @abstractmethod
    def image_features(self, model: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encode the whole views of images.

        Parameters
        ----------
        pixel_values
            (n_images, 3, H, W) float, or as the family's image processor shapes it.

        Returns
        -------
        projected : (n_images, n, width), projector outputs, in the LLM's input space; see `width`
        patches : (n_images, n, D), tower features before the projector, the average of each token's patches
        cls : (n_images, D) of the same layer, or None for towers without a [CLS] token
        """

    def width(self, model: Any) -> int:
        """Numbers of a visual token: those that enter the LLM, and after them what its layers add to them."""
        return int(model.config.get_text_config().hidden_size)

    def answer(self, model: Any, embeds: Tensor, start: int, grid: tuple[int, int]) -> Tensor:
        """Logits of the first token generated after a prompt.

        Parameters
        ----------
        embeds : (b, L, width) float
            Text, the visual tokens from `start` on, text.
        grid
            Rows and columns of the visual tokens.

        Returns
        -------
        (b, vocabulary)
        """
        arguments = self.probed(embeds, start, grid)
        return model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1, **arguments).logits[:, -1]

    def probed(self, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        """What else the model's forward needs to know of such a prompt."""
        return {}

    def encode(self, model: Any, pixels: Tensor, rows: int, cols: int) -> Tensor:
        """Encode an image at another size.

        Parameters
        ----------
        pixels : (3, H, W) float
            As `pixels` gives them.
        rows, cols
            Visual tokens to resize it to.

        Returns
        -------
        (rows * cols, d), projector outputs

        Raises
        ------
        CodebookError
            If the family's tower has one size only.
        """
        raise CodebookError(f"models of type {self.name} cannot encode an image at another size: use another method")

    def fingerprint(self, model: Any) -> str:
        """Identify tower and projector by their sizes and sampled weights, whatever dtype they are loaded in."""
        parts = []
        for module in (self.tower(model), self.projector(model)):
            weights = [p for p in module.parameters() if p.dim() > 1]
            step = max(1, len(weights) // SAMPLED)
            sample = torch.stack([w.detach().flatten()[w.numel() // 2].float() for w in weights[::step][:SAMPLED]])
            hexed = sample.cpu().to(torch.bfloat16).view(torch.int16).numpy().astype(">i2").tobytes().hex()
            parts.append(f"{sum(p.numel() for p in module.parameters())}-{hexed}")
        return ":".join([self.name, *parts])

    @staticmethod
    def same_fingerprint(a: str, b: str) -> bool:
        """Whether two fingerprints are of the same weights, up to the rounding of half-precision types."""
        parts_a, parts_b = a.split(":"), b.split(":")
        if len(parts_a) != len(parts_b) or parts_a[0] != parts_b[0]:
            return False
        for part_a, part_b in zip(parts_a[1:], parts_b[1:], strict=True):
            (size_a, hex_a), (size_b, hex_b) = part_a.split("-"), part_b.split("-")
            if size_a != size_b or len(hex_a) != len(hex_b):
                return False
            if not torch.allclose(_unhex(hex_a), _unhex(hex_b), rtol=2**-6, atol=1e-6):
                return False
        return True


def runs(ids: list[int], token: int) -> list[tuple[int, int]]:
    """Start and length of each run of a token."""
    found, start = [], 0
    for value, group in groupby(ids):
        length = len(list(group))
        if value == token:
            found.append((start, length))
        start += length
    return found


def whole(kind: str, what: str) -> CodebookError:
    """The error of a prompt that does not hold the tokens of whole images."""
    return CodebookError(
        f"{what}: pass whole {kind}s in one forward (no chunked prefill, no truncated prompt), with their pixels"
    )


def dealt(kind: str, layouts: list[Layout], counts: list[int]) -> list[list[Layout]]:
    """The layouts of encoded images dealt to rows that have room for `counts` tokens.

    Beams and `num_return_sequences` repeat whole rows after the encoding: each of a row's copies gets the same.
    """
    encoded, room = sum(layout.length for layout in layouts), sum(counts)
    if not encoded or room % encoded:
        raise whole(kind, f"{room} {kind} tokens in the prompt, where the encoded {kind}s have {encoded}")
    repeats, out, start = room // encoded, [], 0
    for row, count in enumerate(counts):
        mine, stop = [], start
        while count > 0 and stop < len(layouts):
            mine.append(layouts[stop])
            count, stop = count - layouts[stop].length, stop + 1
        if count:
            raise whole(kind, f"the {kind} tokens of prompt {row + 1} are not those of the encoded {kind}s")
        out.append(mine)
        start = stop if row % repeats == repeats - 1 else start
    return out


def _first_pieces(kind: str, encoded: int, per_row: list[int]) -> list[int]:
    """The first of the encoded pieces that each row shows; copies of a row, as of beams, show the same."""
    total = sum(per_row)
    if not encoded or total % encoded:
        raise whole(kind, f"{total} {kind}s in the prompt, where {encoded} were encoded")
    repeats, out, start = total // encoded, [], 0
    for row, count in enumerate(per_row):
        out.append(start)
        start += count if row % repeats == repeats - 1 else 0
    return out


def pooled(values: Tensor, side: int, size: int) -> Tensor:
    """Average squares of `size` x `size` patches of a square image: (side * side, D) to ((side / size)^2, D)."""
    cells = values.reshape(side // size, size, side // size, size, -1)
    return cells.mean((1, 3)).flatten(0, 1)


def _unhex(text: str) -> Tensor:
    bits = [int(text[i : i + 4], 16) for i in range(0, len(text), 4)]
    signed = [b - 65536 if b >= 32768 else b for b in bits]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).float()
