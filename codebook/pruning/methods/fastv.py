"""FastV and its variants: attention as importance (arXiv 2403.06764; variants of arXiv 2502.11501 and 2609.34861)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from codebook.pruning.methods.base import ScoringPruner, option
from codebook.pruning.tokens import VisualTokens, needed


@dataclass(frozen=True)
class FastV(ScoringPruner):
    """Keep the tokens that a query attends to most, averaged over heads, in the layer before the stage.

    Attributes
    ----------
    query
        `text`: the last text token (FastV). `question`: all tokens of the text after the image, added up; text before
        it sees nothing of it, so that this is all of the prompt's text (DeFT). `visual`: the image's last visual token
        (FastV-VIS).
    rotated
        False scores without rotary embeddings, which takes away the preference for the bottom of the image (phi_-R of
        FEATHER, arXiv 2412.13180, when also `image_only`).
    image_only
        Softmax over the image's tokens alone, so that a head weighs by which of them it prefers and not by how much it
        attends to the image (phi_original of FEATHER).
    reverse
        Keep the least attended tokens instead (Reverse FastV).
    own_layer
        Ask the stage's own layer, as it would attend if nothing were dropped, instead of the one before (PyramidDrop,
        arXiv 2410.17247). It projects queries and keys once more for that.
    """

    query: Literal["text", "question", "visual"] = option("text", choices=("text", "question", "visual"))
    rotated: bool = option(True)
    image_only: bool = option(False)
    reverse: bool = option(False)
    own_layer: bool = option(False)
    uses_attention: ClassVar[bool] = True

    def score(self, tokens: VisualTokens) -> Tensor:
        attention = needed(tokens.attention, "the attention of a layer")
        options = {"rotated": self.rotated, "image_only": self.image_only}
        if self.query == "text":
            row = attention.row(-1, **options)
        elif self.query == "question":
            row = attention.rows(tokens.question, **options).sum(0)
        else:
            row = attention.rows(attention.places[-1:], **options)[0]
        return -row if self.reverse else row
