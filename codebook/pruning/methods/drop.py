"""Visual token withdrawal: from one layer on, none (VTW, arXiv 2405.05803)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from codebook.errors import CodebookError
from codebook.pruning.methods.base import Pruner
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class Drop(Pruner):
    """Drop every visual token: for a stage that keeps 0, `Stage(16, 0, Drop())`."""

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        raise CodebookError(f"drop keeps no visual token, not {keep}: leave its keep out")
