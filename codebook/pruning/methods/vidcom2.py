"""VidCom2: tokens unlike their video and unlike their frame, more of them in frames of their own (arXiv 2505.14454)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.errors import CodebookError
from codebook.pruning.methods.base import FramePruner, whole_frames
from codebook.pruning.tokens import VisualTokens

KERNEL_WIDTHS = (2**-3, 2**-2, 2**-1, 2**0, 2**1)
"""Widths a of the Gaussian kernels exp(-x^2 / 2a) that are added up."""

TEMPERATURE = 0.01
"""Temperature of the softmax over frames."""


@dataclass(frozen=True)
class VidCom2(FramePruner):
    """Keep the tokens least like the mean of the video and the mean of their frame; unusual frames keep more.

    Compared are the half of the channels that vary least over the video, scaled to length 1, by a sum of Gaussian
    kernels of the distance to either mean. With u the softmax over frames of minus their tokens' mean likeness to the
    video, a frame keeps 1 + u - mean(u) times its share of the budget. What a frame has no room for goes to the others,
    in proportion. Written from notes on the paper and its code.
    """

    def select_frames(self, frames: Sequence[VisualTokens], keep: int) -> list[Tensor]:
        x = whole_frames(frames)
        steady = x.flatten(0, 1).var(0).argsort(stable=True)[: max(1, x.shape[-1] // 2)]
        x = normalize(x[..., steady], dim=-1)
        to_video, to_frame = likeness(x, x.mean((0, 1))), likeness(x, x.mean(1, keepdim=True))
        unusual = (-to_video.mean(1) / TEMPERATURE).softmax(0)
        counts = [len(frame) for frame in frames]
        scales = (1 + unusual - unusual.mean()).tolist()
        if not all(map(math.isfinite, scales)):
            raise CodebookError(
                "a video's features are not numbers (NaN), so its frames cannot be compared: load the model in "
                "bfloat16 or float32"
            )
        wanted = divided(keep, [scale * count for scale, count in zip(scales, counts, strict=True)], counts)
        return [
            own[frame.ordinal].argsort(stable=True)[:count].sort().values
            for own, frame, count in zip(to_video + to_frame, frames, wanted, strict=True)
        ]


def likeness(x: Tensor, centre: Tensor) -> Tensor:
    """Sum of Gaussian kernels of the distances of tokens (F, N, d) to a centre that broadcasts to them: (F, N)."""
    distance = (x - centre).square().sum(-1)
    return torch.stack([(-distance / (2 * width)).exp() for width in KERNEL_WIDTHS]).sum(0)


def divided(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """A whole number, no more than the sum of `most`, divided in proportion to positive weights up to `most` of each.

    What is cut off is divided among the others in turn; the largest remainders are rounded up, the first ones if equal.
    """
    out, free = [0] * len(most), [i for i, room in enumerate(most) if room]
    while free:
        scale = total / sum(weights[i] for i in free)
        full = [i for i in free if weights[i] * scale >= most[i]]
        if not full:
            break
        for i in full:
            out[i] = most[i]
        total, free = total - sum(most[i] for i in full), [i for i in free if i not in full]
    for i in free:
        out[i] = int(weights[i] * scale)
    short = total - sum(out[i] for i in free)
    for i in sorted(free, key=lambda i: out[i] - weights[i] * scale)[:short]:
        out[i] += 1
    return out
