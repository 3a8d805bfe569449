"""Density-peaks clustering by nearest neighbours (DPC-KNN), as the redundancy codebook uses it."""

from __future__ import annotations

import torch
from torch import Tensor

TIE_BREAK = 1e-6
"""Upper end of the random numbers added to the densities, so that no two are equal."""


ROWS = 2048
"""Points whose distances to all others are held at once."""


def dpc_knn(features: Tensor, clusters: int, neighbours: int = 5, seed: int = 0) -> Tensor:
    """Cluster features around their density peaks (https://arxiv.org/abs/2503.20540, section 3.2).

    A point is a centre if it is dense and far from every denser point; each point joins its nearest centre.

    Parameters
    ----------
    features : (n, d) float
    clusters
        Centres to choose; with fewer points, every point is one.
    neighbours
        Neighbours in a point's density. The point itself is the first, at distance 0, as in the authors' code.
    seed
        Of the tie-break.

    Returns
    -------
    (n,) int64
        Cluster of each point; clusters are numbered from the highest peak.
    """
    n = len(features)
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    # In float64. In float32 the matrix product in cdist is off by 1e-3 for near-equal points, and densities near 1
    # leave the tie-break so few values that equal points tie: both are "densest", and one takes another peak's place.
    x = features.double().cpu()
    blocks = [range(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]
    spread, peak = [], 0.0
    for rows in blocks:
        distance = _distances(x, rows)
        spread.append((distance.topk(min(neighbours, n), dim=1, largest=False).values ** 2).mean(dim=1))
        peak = max(peak, float(distance.max()))
    noise = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    density = (-torch.cat(spread)).exp() + TIE_BREAK * noise
    gap = torch.cat(
        [
            # the densest point has no denser one, and gets the largest distance of all
            _distances(x, rows).masked_fill(density[None] <= density[rows.start : rows.stop, None], peak).amin(dim=1)
            for rows in blocks
        ]
    )
    centres = (gap * density).argsort(descending=True, stable=True)[: min(clusters, n)]
    labels = torch.cdist(x, x[centres]).argmin(dim=1)
    labels[centres] = torch.arange(len(centres))  # a centre stays its own, even with a twin
    return labels


def _distances(x: Tensor, rows: range) -> Tensor:
    """Distances of some points to all, divided by sqrt(d)."""
    part = torch.cdist(x[rows.start : rows.stop], x) / x.shape[1] ** 0.5
    part[torch.arange(len(rows)), torch.arange(rows.start, rows.stop)] = 0
    return part
