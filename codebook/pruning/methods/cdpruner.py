"""CDPruner: what is relevant to the question and diverse, by a conditional determinantal point process (2506.10967)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.pruning.methods.base import Pruner, gram, option, unit_range
from codebook.pruning.methods.centring import centred_gate
from codebook.pruning.methods.question import likeness_to_question
from codebook.pruning.tokens import VisualTokens

ROUNDING = 1e-6
"""Gains below it are float32's rounding: the set already spans all tokens, or the rest have no relevance."""

ROWS_PER_KEPT = 16
"""Tokens per kept one below which the whole kernel is computed at once."""


@dataclass(frozen=True)
class CDPruner(Pruner):
    """Keep the set with the largest determinant of diag(r) S diag(r), greedily.

    S is the cosine similarity of projector outputs. The relevance r is `likeness_to_question`, scaled to [0, 1] in the
    image. The authors take a CLIP text encoder, which the model does not come with.

    Attributes
    ----------
    negated
        Prefer what is least like the question. The authors' code does, for CLIP, whose patches are the less like a text
        the more they show of it; the paper and this default do not.
    centred
        Compare the tokens less the image's mean, and let r count times the gate (`centred_gate`, Cen-Prune).

    Notes
    -----
    The greedy maximum takes keep steps of one row each, by a growing Cholesky factor (arXiv 1709.05135), without a host
    sync.
    """

    negated: bool = option(False)
    centred: bool = option(False)
    uses_text: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        likeness = likeness_to_question(tokens)
        relevance = unit_range(-likeness if self.negated else likeness)
        if self.centred:
            directions, gate = centred_gate(tokens.features)
            relevance = relevance * gate
        else:
            directions = normalize(tokens.features.float(), dim=-1)
        weighted = directions * relevance[:, None]
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
