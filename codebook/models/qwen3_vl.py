"""Qwen3-VL: Qwen2-VL with a text between frames, and visual features added to the first decoder layers (deepstack)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from codebook.models.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    name = "qwen3_vl"

    @contextlib.contextmanager
    def narrowed(self, model: Any, narrow: Callable[[Tensor], Tensor]) -> Iterator[None]:
        decoder = model.get_decoder()
        stock = decoder._deepstack_process

        def process(hidden: Tensor, visual: Tensor, embeds: Tensor) -> Tensor:
            if hidden.shape[1] == visual.shape[1]:
                return stock(hidden, visual, embeds)
            added = hidden.new_zeros(*visual.shape, hidden.shape[-1])
            added[visual.to(hidden.device)] = embeds.to(hidden)
            return hidden + narrow(added)

        decoder._deepstack_process = process
        try:
            yield
        finally:
            del decoder._deepstack_process
