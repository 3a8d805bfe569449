"""TOPS: relevance, coverage and diversity, each step their sum (arXiv 2606.27161)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.pruning.methods.base import Pruner, ScoringPruner, gram, option, unit_range
from codebook.pruning.methods.cls import Cls
from codebook.pruning.methods.combine import Combination
from codebook.pruning.tokens import VisualTokens

CLS = Cls()


@dataclass(frozen=True)
class TOPS(Combination):
    """Again and again the token with the largest r + lambda c + alpha d; the one with the largest r first.

    The coverage c of a token is how much it adds to the sum, over all tokens, of the highest similarity to a kept one.
    The diversity d is its cosine distance from the nearest kept one. Similarities are cosines of hidden states at the
    stage's layer: before the LLM, of projector outputs. The relevance r is scaled to [0, 1] in the image, c and d among
    the tokens that are not kept yet.

    Attributes
    ----------
    coverage, diversity
        The weights lambda and alpha. The authors' alpha is 0.5, their lambda 0.5 before the LLM and 0.4 to 1 in it.
    relevance
        Scores the tokens. Before the LLM the authors take [CLS] attention, in it the mean attention of text tokens.

    Notes
    -----
    Each step costs n * n, without a host sync.
    """

    coverage: float = option(0.5, 0, 10)
    diversity: float = option(0.5, 0, 10)
    relevance: ScoringPruner = CLS
    default_layer: ClassVar[int] = 12

    @property
    def parts(self) -> Sequence[Pruner]:
        return (self.relevance,)

    @property
    def rankers(self) -> Sequence[Pruner]:
        return self.parts

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        relevance = unit_range(self.relevance.score(tokens).float())
        similarity = gram(normalize(tokens.hidden.float(), dim=-1))
        pick = relevance.argmax(keepdim=True)
        chosen, covered = [pick], similarity.index_select(0, pick)[0]
        taken = torch.zeros_like(covered, dtype=torch.bool).index_fill(0, pick, True)
        while len(chosen) < keep:
            gain = (similarity - covered).clamp_(min=0).sum(1)
            score = (
                relevance
                + self.coverage * _scaled_among_free(gain, taken)
                + self.diversity * _scaled_among_free(1 - covered, taken)
            )
            pick = score.where(~taken, -torch.inf).argmax(keepdim=True)
            chosen.append(pick)
            covered = torch.maximum(covered, similarity.index_select(0, pick)[0])
            taken = taken.index_fill(0, pick, True)
        return torch.cat(chosen).sort().values


def _scaled_among_free(values: Tensor, taken: Tensor) -> Tensor:
    """`unit_range` by the extremes of those values that are not taken."""
    low, high = values.where(~taken, torch.inf).amin(), values.where(~taken, -torch.inf).amax()
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
