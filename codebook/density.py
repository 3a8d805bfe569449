"""Density peaks: how dense points lie, and how far each is from a denser one (https://arxiv.org/abs/2503.20540)."""

from __future__ import annotations

import torch
from torch import Tensor

TIE_BREAK = 1e-6
"""Upper end of what is added to the densities, so that no two are equal."""

ROWS = 2048
"""Points whose distances to all others are held at once."""


def density_peaks(x: Tensor, neighbours: int, tie: Tensor) -> tuple[Tensor, Tensor]:
    """Density and gap of each point: the points where their product is high are peaks.

    Distances are euclidean, divided by sqrt(d).

    Parameters
    ----------
    x : (n, d) float64, n >= 1
        In float32 the matrix product in cdist is off by 1e-3 for near-equal points, and densities near 1 leave the
        tie-break so few values that equal points tie: both are "densest", and one takes another peak's place.
    neighbours
        Neighbours in a point's density. The point itself is the first, at distance 0, as in the authors' code.
    tie : (n,) float64
        In [0, 1], what equal densities are told apart by.

    Returns
    -------
    density : (n,) float64
        exp(-mean of the squared distances to the neighbours)
    gap : (n,) float64
        Distance to the nearest denser point; the densest has none, and gets the largest distance of all.
    """
    n = len(x)
    blocks = [range(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]
    spread, peak, distance = [], x.new_zeros(()), x.new_empty(0)
    for rows in blocks:
        distance = _distances(x, rows)
        spread.append((distance.topk(min(neighbours, n), dim=1, largest=False).values ** 2).mean(dim=1))
        peak = torch.maximum(peak, distance.max())
    density = (-torch.cat(spread)).exp() + TIE_BREAK * tie
    gaps = []
    for rows in blocks:
        distance = distance if len(blocks) == 1 else _distances(x, rows)
        gaps.append(distance.where(density[None] > density[rows.start : rows.stop, None], peak).amin(dim=1))
    return density, torch.cat(gaps)


def _distances(x: Tensor, rows: range) -> Tensor:
    """Distances of some points to all."""
    part = torch.cdist(x[rows.start : rows.stop], x) / x.shape[1] ** 0.5
    places = torch.arange(rows.start, rows.stop, device=x.device)
    part[places - rows.start, places] = 0
    return part
