"""EVS: what has changed since the frame before (Efficient Video Sampling, arXiv 2510.14624)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.errors import CodebookError
from codebook.pruning.methods.base import FramePruner, whole_frames
from codebook.pruning.tokens import VisualTokens, on_device


@dataclass(frozen=True)
class EVS(FramePruner):
    """Keep the first frame whole, and of the others the tokens least like those at the same place one frame before.

    Least like is by cosine similarity of what enters the LLM. All frames compete for one budget: a frame in which
    nothing moves may lose everything. The authors raise a budget that is less than one frame; here it is refused.
    """

    def select_frames(self, frames: Sequence[VisualTokens], keep: int) -> list[Tensor]:
        counts, whole = [len(frame) for frame in frames], whole_frames(frames)
        if keep < counts[0]:
            # Each frame's share of what it had is rounded down to whole tokens.
            least = math.ceil(1000 * -(-counts[0] // len(frames)) / whole.shape[1]) / 1000
            raise CodebookError(
                f"evs keeps the first frame whole, {counts[0]} tokens, but {keep} of {sum(counts)} are to stay: keep "
                f"{least} or more, show more frames, or use vidcom2"
            )
        unit = normalize(whole, dim=-1)
        change = 1 - (unit[1:] * unit[:-1]).sum(-1)
        scores = [torch.full_like(unit[0, :, 0], torch.inf), *change]
        score = torch.cat([own[frame.ordinal] for own, frame in zip(scores, frames, strict=True)])
        kept = score.argsort(descending=True, stable=True)[:keep].sort().values
        # How many of the ascending indices lie before each frame, and so where it begins among them.
        begins = list(accumulate(counts, initial=0))
        edges = torch.searchsorted(kept, on_device(begins, kept.device)).tolist()
        return [kept[a:b] - start for a, b, start in zip(edges, edges[1:], begins, strict=False)]
