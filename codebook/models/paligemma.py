"""PaliGemma: a fixed number of visual tokens before the text, and a prompt whose tokens all see each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codebook.models.base import Family, Model, cache_of


class PaliGemma(Family):
    name = "paligemma"
    reusable_prefix = False
    window_last = False

    def blocks(self, model: Model, given: dict[str, Any]) -> Tensor | None:
        types, cache = given.get("token_type_ids"), cache_of(given)
        started = cache is not None and cache.is_initialized and given.get("pixel_values") is None
        return None if types is None or started else torch.where(types == 0, 0, -1)

    def probe_arguments(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        return {"token_type_ids": torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)}
