"""Gemma 3: SigLIP features pooled to a fixed number of tokens per image, which see each other in both directions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from codebook.models.base import Family, Model


class Gemma3(Family):
    name = "gemma3"
    reusable_prefix = False

    def merge(self, model: Model) -> int:
        return self.patches(model)[0] // math.isqrt(model.config.mm_tokens_per_image)

    def blocks(self, model: Model, given: dict[str, Any]) -> Tensor | None:
        types = given.get("token_type_ids")
        return None if types is None else image_blocks(types == 1)

    def probe_arguments(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        return {"token_type_ids": image_types(embeds, start, grid)}


def image_types(embeds: Tensor, start: int, grid: tuple[int, int]) -> Tensor:
    """(b, L) int64: 1 for the tokens of an image that begins at a column, else 0."""
    types = torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    types[:, start : start + grid[0] * grid[1]] = 1
    return types


def image_blocks(image: Tensor) -> Tensor:
    """(B, L) int64: a number per run of an image's tokens, from where they are (B, L) bool; -1 elsewhere."""
    first = image & ~nn.functional.pad(image, (1, 0))[:, :-1]
    return torch.where(image, first.cumsum(1) - 1, -1)
