"""What a model family has to tell the rest of the package."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from codebook.errors import CodebookError
from codebook.models.layout import KINDS, Encoded, Image, Layout, whole

Model = Any
"""A stock transformers vision-language model: `PreTrainedModel`, whose towers and decoders have no common type."""

Processor = Any
"""The processor that goes with a model: `ProcessorMixin`."""

SAMPLED = 32
"""Weights sampled from each of tower and projector for the fingerprint."""


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


def _unhex(text: str) -> Tensor:
    bits = [int(text[i : i + 4], 16) for i in range(0, len(text), 4)]
    signed = [b - 65536 if b >= 32768 else b for b in bits]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).float()
