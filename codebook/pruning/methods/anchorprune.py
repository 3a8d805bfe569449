"""AnchorPrune: a protected anchor of what the question asks for, and diversity around it (arXiv 2607.07033)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.pruning.methods.base import Pruner, gram, option
from codebook.pruning.methods.cls import Cls
from codebook.pruning.methods.farthest import farthest_in_turn
from codebook.pruning.methods.question import likeness_to_question
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class AnchorPrune(Pruner):
    """Keep the most relevant tokens, as many as say the same, then what is important and unlike all that is kept.

    The anchor goes down the ranking by relevance. Its first tokens are in it whatever they are. Each further one joins,
    up to half of what stays, until so many were novel: further than a distance from all before it. That one is the
    first outside. To the anchor come, again and again, the tokens with the largest importance times cosine distance to
    the nearest kept token.

    The relevance is `likeness_to_question`, as in `CDPruner`; the authors take the negated similarity of CLIP's patches
    and text in LLaVA, and match words and tokens behind the projector in Qwen. The importance is `Cls`. Distances are
    those of projector outputs.

    Attributes
    ----------
    least, most
        Shares of the kept tokens that the anchor has at least, rounded, one or more, and at most. The authors' least is
        10 of 64.
    novel
        Cosine distance from the tokens before it beyond which a token counts as novel.
    novelties
        How many novel tokens end the anchor.
    """

    least: float = option(10 / 64, 0, 1)
    most: float = option(0.5, 0, 1)
    novel: float = option(0.2, 0, 2)
    novelties: int = option(3, 1)
    uses_text: ClassVar[bool] = True
    uses_vision: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        ranked = likeness_to_question(tokens).argsort(descending=True, stable=True)
        similarity = gram(normalize(tokens.features.float(), dim=-1))
        least = max(1, round(self.least * keep))
        ranked = ranked[: max(least, int(self.most * keep))]
        anchored = in_anchor(similarity[ranked][:, ranked], least, self.novel, self.novelties)
        # How many the anchor has is known on the device alone, so enough others are chosen for the smallest one.
        nearest = similarity[:, ranked].where(anchored, -torch.inf).amax(1)
        nearest = nearest.scatter(0, ranked, torch.where(anchored, torch.inf, nearest[ranked]))
        others = farthest_in_turn(similarity[None], nearest[None], keep - least, Cls().score(tokens)[None])[0]
        turn = torch.cat([torch.where(anchored, -1, keep), torch.arange(keep - least, device=ranked.device)])
        return torch.cat([ranked, others])[turn.topk(keep, largest=False).indices].sort().values


def in_anchor(similarity: Tensor, least: int, novel: float, novelties: int) -> Tensor:
    """Which tokens are in the anchor, of those with these similarities (m, m), the most relevant first: (m,) bool.

    The other parameters are those of `AnchorPrune`, `least` as a count.
    """
    before = torch.ones_like(similarity, dtype=torch.bool).tril(-1)
    new = similarity.where(before, -torch.inf).amax(1) < 1 - novel
    new[:least] = False
    return new.cumsum(0) < novelties
