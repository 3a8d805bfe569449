"""EVS: what has changed since the frame before (Efficient Video Sampling, arXiv 2510.14624)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from codebook.errors import CodebookError
from codebook.pruning.methods.base import LEAST_LENGTH, FramePruner, whole_frames
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
        length, device = whole.norm(dim=-1).clamp(min=LEAST_LENGTH), whole.device
        # Divided by their lengths afterwards: to scale all tokens first would take half of the time.
        change = 1 - (whole[1:] * whole[:-1]).sum(-1) / (length[1:] * length[:-1])
        score = torch.cat([torch.full_like(length[:1], torch.inf), change])
        # All frames at once: one after the other, they would take several kernels each.
        frame = torch.arange(len(frames), device=device)
        frame = frame.repeat_interleave(on_device(counts, device), output_size=sum(counts))
        own = score[frame, torch.cat([one.ordinal for one in frames])]
        kept = own.argsort(descending=True, stable=True)[:keep].sort().values
        # How many of the ascending indices lie before each frame, and so where it begins among them.
        begins = on_device(list(accumulate(counts, initial=0)), device)
        edges = torch.searchsorted(kept, begins).tolist()
        return list((kept - begins[frame[kept]]).split([after - before for before, after in pairwise(edges)]))
