"""What a model family has to tell the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from codebook.errors import CodebookError

SAMPLED = 32
"""Weights sampled from each of tower and projector for the fingerprint."""


@dataclass(frozen=True)
class Image:
    """One image's visual tokens in a prompt: `rows * cols` consecutive columns from `start`, in raster order."""

    start: int
    rows: int
    cols: int

    @property
    def count(self) -> int:
        return self.rows * self.cols


class Family(ABC):
    """One model family, stateless; subclasses are registered in `codebook.models`."""

    name: str

    @abstractmethod
    def check(self, config: Any) -> Family:
        """Return self, or raise a CodebookError when this variant of the family is not supported."""

    @abstractmethod
    def tower(self, model: Any) -> nn.Module:
        """The vision tower, whose first argument is `pixel_values`, one row an image."""

    @abstractmethod
    def projector(self, model: Any) -> nn.Module:
        """The module that maps tower features to the LLM's input space."""

    @abstractmethod
    def vision_attention(self, model: Any) -> nn.Module:
        """The attention module of the tower's layer whose output feeds the projector."""

    @abstractmethod
    def has_cls(self, model: Any) -> bool:
        """Whether the tower puts a [CLS] token before the patches."""

    @abstractmethod
    def grid(self, model: Any) -> tuple[int, int]:
        """Rows and columns of one image's visual tokens."""

    @abstractmethod
    def images(self, model: Any, input_ids: list[int]) -> list[Image]:
        """The images of one prompt, in order, from its token ids."""

    @abstractmethod
    def image_features(self, model: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encode images.

        Parameters
        ----------
        pixel_values : (n_images, 3, H, W) float

        Returns
        -------
        projected : (n_images, n, d), projector outputs, in the LLM's input space
        patches : (n_images, n, D), tower features before the projector
        cls : (n_images, D) of the same layer, or None for towers without a [CLS] token
        """

    def encode(self, model: Any, pixel_values: Tensor, rows: int, cols: int) -> Tensor:
        """Encode an image at another size.

        Parameters
        ----------
        pixel_values : (3, H, W) float
            As the tower gets them.
        rows, cols
            Patches to resize it to.

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


def _unhex(text: str) -> Tensor:
    bits = [int(text[i : i + 4], 16) for i in range(0, len(text), 4)]
    signed = [b - 65536 if b >= 32768 else b for b in bits]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).float()
