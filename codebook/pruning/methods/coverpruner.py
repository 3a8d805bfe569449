"""CoverPruner: what covers best the tokens that the question asks for (arXiv 2609.03158)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from codebook.pruning.methods.base import Pruner, gram
from codebook.pruning.methods.centring import centred
from codebook.pruning.methods.fastv import FastV
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class CoverPruner(Pruner):
    """Facility location with demand: keep the set that maximises sum over i of w_i max over kept j of max(0, s_ij).

    The demand w is the attention of the text after the image, in the layer before: the authors ask the first decoder
    layer, so the method stands at layer 1 unless told otherwise. s is the cosine similarity of projector outputs less
    the image's mean. The maximum is greedy. The formula is from second-hand notes.
    """

    uses_attention: ClassVar[bool] = True
    uses_text: ClassVar[bool] = True
    default_layer: ClassVar[int] = 1

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        demand = FastV(query="question").score(tokens)
        return greedy_cover(gram(centred(tokens.features)), keep, demand, torch.ones_like(demand))


def greedy_cover(similarity: Tensor, keep: int, demand: Tensor, value: Tensor) -> Tensor:
    """The tokens that cover the others, chosen one after the other by value_i sum_j demand_j max(0, s_ij - covered_j).

    covered_j is the highest similarity of j to a token that was chosen, 0 at least. Each step costs n * n, without a
    host sync.

    Parameters
    ----------
    similarity : (n, n) float32
    demand : (n,) float32
        What it is worth that a token is covered, 0 or more.
    value : (n,) float32
        What a token's own coverage counts times, 0 or more.

    Returns
    -------
    (keep,) int64, ascending
    """
    covered, free, chosen = torch.zeros_like(demand), torch.zeros_like(demand), []
    for _ in range(keep):
        gain = (similarity - covered).clamp_(min=0) @ demand
        pick = (gain * value + free).argmax(keepdim=True)
        chosen.append(pick)
        covered = torch.maximum(covered, similarity.index_select(0, pick)[0])
        free = free.index_fill(0, pick, -torch.inf)
    return torch.cat(chosen).sort().values
