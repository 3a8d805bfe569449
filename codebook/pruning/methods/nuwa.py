"""Nuwa: the most salient tokens of every small region of the grid (arXiv 2602.02951)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from codebook.pruning.methods.base import Pruner, option
from codebook.pruning.methods.cls import Cls
from codebook.pruning.methods.combine import Window
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class Nuwa(Pruner):
    """Keep the tokens of each region that have the most [CLS] attention times length of the key: the first stage.

    Every region keeps the same number, or one more where its next token ranks highest (`Window`). What the authors then
    add to the kept tokens, from the tokens around them, they add in the tower's space: it is left out.

    Attributes
    ----------
    region
        Rows and columns of tokens in a region; 2 in the authors' code.
    """

    region: int = option(2, 1, 2**15)
    uses_vision: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        down, across = (-(-side // self.region) for side in tokens.grid)
        return Window(Cls(keyed=True), (down, across)).select(tokens, keep)
