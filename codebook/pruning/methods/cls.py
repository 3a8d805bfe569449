"""[CLS] attention of the vision tower as importance (FasterVLM, later VisPruner, arXiv 2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from codebook.pruning.methods.base import ScoringPruner, option
from codebook.pruning.tokens import VisualTokens, needed


@dataclass(frozen=True)
class Cls(ScoringPruner):
    """Keep the patches that [CLS] attends to most, averaged over heads, in the tower's layer that feeds the projector.

    In towers without [CLS], as SigLIP: the patches that all patches attend to most, on average.

    Attributes
    ----------
    keyed
        Times the length of the patch's key in that layer, over all heads (Nuwa, arXiv 2602.02951).
    """

    keyed: bool = option(False)
    uses_vision: ClassVar[bool] = True

    def score(self, tokens: VisualTokens) -> Tensor:
        vision = needed(tokens.vision, "the vision tower's attention")
        score = vision.received() * vision.lengths() if self.keyed else vision.received()
        return score[tokens.ordinal]
