"""Density-peaks clustering by nearest neighbours (DPC-KNN), as the redundancy codebook uses it."""

from __future__ import annotations

import torch
from torch import Tensor

TIE_BREAK = 1e-6
"""Upper end of the random numbers added to the densities, so that no two are equal."""


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
    n, dimension = features.shape
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    x = features.double().cpu()
    # By matrix product, and in float64: in float32 that product is off by about 1e-3 for near-equal points. The
    # rounded result is the float32 distance.
    distance = (torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist") / dimension**0.5).float()
    distance.fill_diagonal_(0)
    nearest = distance.topk(min(neighbours, n), dim=1, largest=False).values
    noise = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    density = (-(nearest**2).mean(dim=1)).exp() + TIE_BREAK * noise
    denser = density[None, :] > density[:, None]
    gap = distance.masked_fill(~denser, float(distance.max())).amin(dim=1)  # of the densest: the largest distance
    centres = (gap * density).argsort(descending=True, stable=True)[: min(clusters, n)]
    labels = distance[:, centres].argmin(dim=1)
    labels[centres] = torch.arange(len(centres))  # a centre stays its own, even with a twin
    return labels
