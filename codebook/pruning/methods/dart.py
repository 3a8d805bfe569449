"""DART: duplication matters more than importance (arXiv 2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.pruning.methods.base import Pruner, option
from codebook.pruning.tokens import VisualTokens, needed


@dataclass(frozen=True)
class Dart(Pruner):
    """Keep a few pivots and, for each, the visual tokens least like it.

    Pivots are the image's and the question's tokens whose keys in the layer before, rotated and of all heads, have the
    largest L1 norms. Pivots take turns, those of the image first and each kind by descending norm: each keeps the
    tokens, not yet kept, whose hidden states have the lowest cosine similarity to its own, both put through the
    decoder's last normalisation. The image's pivots are kept themselves. The authors give floor(R / 8) tokens to each
    pivot, in no fixed order, and keep 8 * floor(R / 8) + 4; here exactly R stay: what the image's pivots leave of R is
    divided evenly, and the first pivots in order get the remainder, one each.

    Attributes
    ----------
    image_pivots, text_pivots
        How many, or as many as there are.
    """

    image_pivots: int = option(4, 1)
    text_pivots: int = option(4, 0)
    uses_attention: ClassVar[bool] = True
    uses_text: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        length = needed(tokens.attention, "the attention of the layer before").key.float().abs().sum((0, 2))
        image = length[tokens.span].topk(min(self.image_pivots, keep)).indices
        text = tokens.question[length[tokens.question].topk(min(self.text_pivots, len(tokens.question))).indices]
        norm = needed(tokens.norm, "the decoder's last normalisation")
        hidden = normalize(norm(tokens.hidden).float(), dim=-1)
        pivots = torch.cat([hidden[image], normalize(norm(tokens.sequence[text]).float(), dim=-1)])
        similarity = pivots @ hidden.T
        chosen, rest = [image], keep - len(image)
        for i in range(len(pivots)):
            similarity.index_fill_(1, chosen[-1], torch.inf)  # an assignment would wait for the device
            share = rest // len(pivots) + (i < rest % len(pivots))
            chosen.append(similarity[i].topk(share, largest=False).indices)
        return torch.cat(chosen).sort().values
