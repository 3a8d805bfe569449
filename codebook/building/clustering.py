"""Density-peaks clustering by nearest neighbours (DPC-KNN), as the redundancy codebook uses it."""

from __future__ import annotations

import torch
from torch import Tensor

from codebook.density import density_peaks


def dpc_knn(features: Tensor, clusters: int, neighbours: int = 5, seed: int = 0) -> Tensor:
    """Cluster features around their density peaks (https://arxiv.org/abs/2503.20540, section 3.2).

    A point is a centre if it is dense and far from every denser point; each point joins its nearest centre.

    Parameters
    ----------
    features : (n, d) float
    clusters
        Centres to choose; with fewer points, every point is one.
    neighbours
        Neighbours in a point's density (`density_peaks`).
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
    x = features.double().cpu()
    tie = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    density, gap = density_peaks(x, neighbours, tie)
    centres = (gap * density).argsort(descending=True, stable=True)[: min(clusters, n)]
    labels = torch.cdist(x, x[centres]).argmin(dim=1)
    labels[centres] = torch.arange(len(centres))  # a centre stays its own, even with a twin
    return labels
