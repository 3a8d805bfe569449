"""A check that a model's outputs are numbers: damaged weights, or an overflow of half precision, make them NaN."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from codebook.models.finite import check_logits, overflown


class NanWatch(LogitsProcessor):
    """Watches the logits of a generation and leaves them as they are.

    `check` looks at what was seen once, at the end: to look at every token would make the device wait for each.
    """

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self._seen.append(overflown(scores))
        return scores

    def check(self) -> None:
        """Raise a CodebookError if any logits were NaN or infinite."""
        if self._seen:
            check_logits(torch.where(torch.stack(self._seen), torch.nan, 0.0))
