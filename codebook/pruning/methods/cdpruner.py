"""CDPruner: what is relevant to the question and diverse, by a conditional determinantal point process (2506.10967)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.errors import CodebookError
from codebook.pruning.methods.base import Pruner, gram, unit_range
from codebook.pruning.tokens import VisualTokens

ROUNDING = 1e-6
"""Gains below it are float32's rounding: the set already spans all tokens, or the rest have no relevance."""

ROWS_PER_KEPT = 16
"""Tokens per kept one below which the whole kernel is computed at once."""


@dataclass(frozen=True)
class CDPruner(Pruner):
    """Keep the set with the largest determinant of diag(r) S diag(r), greedily.

    S is the cosine similarity of projector outputs. The relevance r is the cosine similarity of a token's hidden state
    to the mean of the question's, scaled to [0, 1] in the image: before the LLM, of its input to the mean of the
    question's word embeddings. The authors take a CLIP text encoder, which the model does not come with. What of the
    text after the image is template and what is question the model cannot tell: all of it counts.

    Attributes
    ----------
    negated
        Prefer what is least like the question. The authors' code does, for CLIP, whose patches are the less like a text
        the more they show of it; the paper and this default do not.

    Notes
    -----
    The greedy maximum takes keep steps of one row each, by a growing Cholesky factor (arXiv 1709.05135), without a host
    sync.
    """

    negated: bool = False
    uses_text: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        if not len(tokens.question):
            raise CodebookError("cdpruner needs the question's text: use it in a schedule, on a model's own forward")
        question = normalize(tokens.sequence[tokens.question].float().mean(0), dim=0)
        relevance = normalize(tokens.hidden.float(), dim=-1) @ (-question if self.negated else question)
        relevance = unit_range(relevance)
        weighted = normalize(tokens.features.float(), dim=-1) * relevance[:, None]
        gain = weighted.square().sum(1)
        # A product of matrices computes a row several times faster than one row after the other, but computes them all.
        kernel = gram(weighted) if len(tokens) < ROWS_PER_KEPT * keep else None
        factor = weighted.new_zeros(keep, len(tokens))
        chosen = []
        for i in range(keep):
            # One place, not a number: indexing with a number on the device waits for it.
            pick = gain.argmax(keepdim=True)
            chosen.append(pick)
            # Selected, not indexed: that is several times faster for the few numbers of a step.
            rows = weighted.index_select(0, pick) @ weighted.T if kernel is None else kernel.index_select(0, pick)
            if i:
                rows = torch.addmm(rows, factor[:i].index_select(1, pick).T, factor[:i], alpha=-1)
            most = gain.index_select(0, pick)
            factor[i] = rows[0] * torch.where(most > ROUNDING, most.rsqrt(), 0)
            gain = torch.addcmul(gain, factor[i], factor[i], value=-1).index_fill_(0, pick, -torch.inf)
        return torch.cat(chosen).sort().values
