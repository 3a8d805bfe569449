"""VisionZip: dominant tokens by [CLS] attention and contextual tokens that average the others (arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.pruning.methods.base import Pruner, group_means, option
from codebook.pruning.methods.cls import Cls
from codebook.pruning.tokens import VisualTokens, needed


@dataclass(frozen=True)
class VisionZip(Pruner):
    """Keep the dominant tokens, and a few contextual ones into which all others are averaged.

    Dominant are those with most [CLS] attention (`Cls`). Of the others, some at even distances in raster order are
    targets; each of the rest joins the target whose key in the vision tower, averaged over heads, has the highest
    cosine similarity to its own. A target becomes the average of its group. The authors merge tower features before the
    projector and add that average, the target left out, to the target; here it is the LLM's input, or its hidden
    states, that is averaged, and the target counts as one of its group, so that its norm does not double.

    Attributes
    ----------
    dominant
        Share of the kept tokens that is dominant, rounded; the authors keep 54 and 10.
    """

    dominant: float = option(54 / 64, 0, 1)
    uses_vision: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        dominant, targets = self._parts(tokens, keep)
        return torch.cat([dominant, targets]).sort().values

    def merge(self, tokens: VisualTokens, index: Tensor) -> Tensor | None:
        keep = len(index)
        targets = self._parts(tokens, keep)[1]
        if not len(targets):
            return None
        key = normalize(needed(tokens.vision, "the vision tower's attention").descriptors()[tokens.ordinal], dim=-1)
        group = torch.searchsorted(index, targets)[(key @ key[targets].T).argmax(1)]
        group[index] = torch.arange(keep, device=index.device)
        return group_means(tokens.hidden, group, keep)

    def _parts(self, tokens: VisualTokens, keep: int) -> tuple[Tensor, Tensor]:
        """The dominant tokens and the targets. Worked out once: another forward may order them in another way."""
        return tokens.once((self, keep), lambda: self._divided(tokens, keep))

    def _divided(self, tokens: VisualTokens, keep: int) -> tuple[Tensor, Tensor]:
        order = Cls().score(tokens).argsort(descending=True, stable=True)
        count = round(self.dominant * keep)
        others, contextual = order[count:].sort().values, keep - count
        step = len(others) // max(1, contextual)
        return order[:count], others[step * torch.arange(contextual, device=others.device)]
