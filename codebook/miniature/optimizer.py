"""Muon for the matrices inside the transformer blocks, AdamW for everything else.

Muon (https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the nearest orthogonal
matrix. On a run of minutes it learns several times faster than AdamW alone.

`torch.optim.Muon` is not used: it came with torch 2.9, and 2.6 is supported; it computes in bfloat16 and does not share
the matrices among workers, so the weights that ship could not be trained again by their command.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

MOMENTUM = 0.95
WEIGHT_DECAY = 0.01


class Muon:
    """Momentum with orthogonalised updates; matrices of one shape are handled in one batch.

    Parameters
    ----------
    parameters : matrices
    share : index of this worker and number of workers; each orthogonalises its part of the matrices
    merge : sums a tensor over the workers
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        share: tuple[int, int] = (0, 1),
        merge: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    ):
        self.parameters = list(parameters)
        self.share, self.merge = share, merge
        self.buffers = [torch.zeros_like(p) for p in self.parameters]
        groups: dict[torch.Size, list[int]] = defaultdict(list)
        for i, parameter in enumerate(self.parameters):
            groups[parameter.shape].append(i)
        self.groups = list(groups.values())

    @torch.no_grad()
    def step(self, rate: float, factors: list[float] | None = None) -> None:
        """Move every matrix; `factors` scale the rate of each."""

        def gradient(i: int) -> torch.Tensor:
            found = self.parameters[i].grad
            assert found is not None
            return found

        index, workers = self.share
        updates = [torch.zeros_like(b) for b in self.buffers]
        for group in self.groups:
            mine = group[index::workers]
            for i in group:
                self.buffers[i].lerp_(gradient(i), 1 - MOMENTUM)
            if not mine:
                continue
            ahead = [self.buffers[i].lerp(gradient(i), 1 - MOMENTUM) for i in mine]
            for i, update in zip(mine, orthogonal(torch.stack(ahead)), strict=True):
                updates[i] = update
        if workers > 1:
            flat = self.merge(torch.cat([u.flatten() for u in updates]))
            parts = flat.split([u.numel() for u in updates])
            updates = [part.view_as(u) for part, u in zip(parts, updates, strict=True)]
        factors = factors or [1.0] * len(updates)
        for parameter, update, factor in zip(self.parameters, updates, factors, strict=True):
            rows, columns = parameter.shape
            stride = rate * factor
            parameter.mul_(1 - stride * WEIGHT_DECAY).add_(update, alpha=-stride * max(1, rows / columns) ** 0.5)

    def state_dict(self) -> dict:
        return {"buffers": self.buffers}

    def load_state_dict(self, state: dict) -> None:
        for buffer, saved in zip(self.buffers, state["buffers"], strict=True):
            buffer.copy_(saved)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Push the singular values of each matrix (N, rows, columns) towards 1 by five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
