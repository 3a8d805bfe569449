"""Downsampling the image: the baseline that encodes fewer patches to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from codebook.errors import CodebookError
from codebook.pruning.methods.base import Pruner
from codebook.pruning.methods.uniform import evenly_spaced
from codebook.pruning.tokens import VisualTokens, needed


@dataclass(frozen=True)
class Downsample(Pruner):
    """Resize the image to r x c = keep patches, of the aspect nearest to its own, and encode it anew.

    The new tokens stand at the centres of the cells that they show. Works before the LLM only, with towers that
    interpolate their positions. The pass over the whole image is made as well: a baseline of quality and not of speed.

    Raises
    ------
    CodebookError
        If the count is no product of rows and columns that fit in the image's grid; it names the nearest that are.
    """

    before_llm: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        rows, cols = tokens.grid
        if len(tokens) < rows * cols:
            raise CodebookError("downsample needs the whole image: make it the first stage")
        down, across = _patch_grid(rows, cols, keep)
        device = tokens.ordinal.device
        return (evenly_spaced(rows, down, device)[:, None] * cols + evenly_spaced(cols, across, device)).flatten()

    def merge(self, tokens: VisualTokens, index: Tensor) -> Tensor:
        encode = needed(tokens.encode, "the image's pixels, before the LLM (layer 0)")
        return encode(*_patch_grid(*tokens.grid, len(index))).to(tokens.hidden)


def _patch_grid(rows: int, cols: int, keep: int) -> tuple[int, int]:
    def fits(count: int) -> list[tuple[int, int]]:
        return [(r, count // r) for r in range(1, rows + 1) if count % r == 0 and count // r <= cols]

    if sizes := fits(keep):
        return min(sizes, key=lambda size: max(size[0] * cols, size[1] * rows) / min(size[0] * cols, size[1] * rows))
    below = next(count for count in range(keep, 0, -1) if fits(count))
    above = next(count for count in range(keep, rows * cols + 1) if fits(count))
    raise CodebookError(f"no {rows} x {cols} image shrinks to {keep} patches: keep {below} or {above} instead")
