"""Density-peaks clustering by nearest neighbours (DPC-KNN), as the redundancy codebook uses it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codebook.store.search import exact_search, faiss_or_none, has_gpu

DENSITY_NOISE = 1e-6
"""Largest of the random numbers that are added to the densities, so that no two are equal."""
EXACT = 20_000
"""Points up to which every neighbour is found by comparing all pairs: 81 s on one core for d = 1024."""
HELD = 2**22
"""Distances held at once: 32 MiB in float64, whatever the number of points; four times as many were no faster."""
PEAK_BLOCK = 256
"""Points that are compared with many others at once."""
COMPARED = 64
"""Lists, of 4 sqrt(n), whose points are compared with those of the list in their middle."""
SAMPLED = 40
"""Points per list of which k-means learns the lists."""


def dpc_knn(features: Tensor, clusters: int, neighbours: int = 5, seed: int = 0, exact: int = EXACT) -> Tensor:
    """Cluster features around their density peaks (https://arxiv.org/abs/2503.20540, section 3.2).

    A point is a centre if it is dense and far from every denser point; each point joins its nearest centre. Up to
    `exact` points all of it is exact. Beyond, only the neighbours that make a density are approximate: an inverted
    file of FAISS finds them (without FAISS all pairs are compared, in float32). Given the densities, the distances
    to denser points, the centres and the clusters are exact at any size. No n x n matrix is ever held.

    Parameters
    ----------
    features : (n, d) float
    clusters
        Centres to choose; with fewer points, every point is one.
    neighbours
        Neighbours in a point's density. The point itself is the first, at distance 0, as in the authors' code.
    seed
        Seed of the tie-break and of the inverted file.
    exact
        Points up to which no search is approximate.

    Returns
    -------
    (n,) int64
        Cluster of each point; clusters are numbered from the highest peak.
    """
    n = len(features)
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    x = features.detach().cpu()
    # Distances are in float64. In float32 the matrix product in cdist is off by 1e-3 for near-equal points, and
    # densities near 1 leave the tie-break so few values that equal points tie: both are "densest", and one takes
    # another peak's place.
    nearest = _nearest(x.double(), min(neighbours, n)) if n <= exact else _nearest_of_many(x, neighbours, seed)
    square, index = nearest
    noise = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    density = (-square[:, :neighbours].mean(dim=1)).exp() + DENSITY_NOISE * noise
    # the densest point has no denser one, and its gap stays infinite
    gap = square.sqrt().masked_fill_(density[index] <= density[:, None], math.inf).amin(dim=1)
    centres = _peaks(x, density, gap, min(clusters, n))
    labels = [torch.cdist(part.double(), x[centres].double()).argmin(dim=1) for part in x.split(_rows(x, len(centres)))]
    clustered = torch.cat(labels)
    clustered[centres] = torch.arange(len(centres))  # a centre stays its own, even with a twin
    return clustered


def _nearest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances, over d, of each point to its `k` nearest, itself first, and which they are: (n, k) each."""
    square, index = [], []
    for start in range(0, len(x), rows := _rows(x, len(x))):
        distance = torch.cdist(x[start : start + rows], x)
        distance[torch.arange(len(distance)), torch.arange(start, start + len(distance))] = 0
        found = distance.topk(k, dim=1, largest=False)
        square.append(found.values**2 / x.shape[1])
        index.append(found.indices)
    return torch.cat(square), torch.cat(index)


def _nearest_of_many(x: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same of many points: a search proposes twice as many, and their distances are computed in float64."""
    wanted = min(2 * k, len(x))
    index = _proposed(x, wanted, seed)
    square = torch.empty(len(x), wanted, dtype=torch.float64)
    for start in range(0, len(x), rows := max(1, HELD // (4 * wanted * x.shape[1]))):
        rows_here = torch.arange(start, min(start + rows, len(x)))[:, None]
        found = index[start : start + rows]
        found[:, -1] = torch.where((found == rows_here).any(dim=1), found[:, -1], rows_here[:, 0])
        found = torch.where(found < 0, rows_here, found)  # fewer points in the lists compared than asked for
        distance = (x[found].double() - x[rows_here].double()).square().sum(dim=2) / x.shape[1]
        nearest = distance.sort(dim=1, stable=True)
        square[start : start + rows], index[start : start + rows] = nearest.values, found.gather(1, nearest.indices)
    return square, index


def _proposed(x: Tensor, k: int, seed: int) -> Tensor:
    """Which points are probably the `k` nearest of each, itself included: (n, k) int64, -1 where fewer are found.

    k-means puts the points into lists, and those of a list are compared, in float32, with those of the lists around it.
    Each comparison is one product of matrices, which FAISS's own inverted files, that take queries one by one, are not.
    """
    faiss = faiss_or_none()
    if faiss is None:
        return torch.cat([_all_pairs(x.float(), part.float(), k) for part in x.split(PEAK_BLOCK)])
    knn, lists = exact_search(faiss), min(int(4 * len(x) ** 0.5), len(x))
    sample = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: SAMPLED * lists].sort().values
    means = faiss.Kmeans(x.shape[1], lists, niter=10, seed=seed, gpu=has_gpu(faiss), min_points_per_centroid=1)
    means.train(x[sample].float().numpy())
    parts = x.split(_rows(x, lists))
    owner = torch.cat([torch.from_numpy(knn(part.float().numpy(), means.centroids, 1)[1][:, 0]) for part in parts])
    members = owner.argsort(stable=True).split(owner.bincount(minlength=lists).tolist())
    around = knn(means.centroids, means.centroids, min(COMPARED, lists))[1]
    index = torch.full((len(x), k), -1)
    for own, lists_around in zip(members, around, strict=True):
        others = torch.cat([members[i] for i in lists_around])
        if len(own):
            found = knn(x[own].float().numpy(), x[others].float().numpy(), min(k, len(others)))[1]
            index[own, : found.shape[1]] = others[torch.from_numpy(found)]
    return index


def _all_pairs(x: Tensor, query: Tensor, k: int) -> Tensor:
    best = torch.full((len(query), k), math.inf)
    index = torch.full((len(query), k), -1)
    for start in range(0, len(x), rows := max(k, HELD // len(query))):
        found = torch.cdist(query, x[start : start + rows]).topk(min(k, len(x) - start), dim=1, largest=False)
        both = torch.cat([best, found.values], dim=1).topk(k, dim=1, largest=False)
        index = torch.cat([index, found.indices + start], dim=1).gather(1, both.indices)
        best = both.values
    return index


def _peaks(x: Tensor, density: Tensor, gap: Tensor, count: int) -> Tensor:
    """The `count` points with the highest product of density and distance to the nearest denser point, best first.

    The distance to any denser point bounds that distance from above. So the points are measured in the order of their
    bounds, until the next bound cannot reach the `count`-th best of those measured. Unmeasured points without a denser
    neighbour come first; they are few, since a density's neighbours nearly always include a denser point.

    Parameters
    ----------
    x : (n, d) float
    density : (n,) float64
    gap : (n,) float64
        Distance of each point to some denser point, or infinity; changed in place.
    """
    order = density.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    measured, least = order[:0], -math.inf
    for block in (gap * density).argsort(descending=True, stable=True).split(PEAK_BLOCK):
        block = block[(gap * density)[block] >= least]
        if not len(block):
            break
        for part in order[: int(rank[block].max()) + 1].split(_rows(x, len(block))):
            _narrow(gap, x, block, part, rank)
        measured = torch.cat([measured, block])
        if len(measured) >= count:
            least = float((gap * density)[measured].topk(count).values[-1])
    measured = measured.sort().values
    return measured[(gap * density)[measured].argsort(descending=True, stable=True)[:count]]


def _narrow(gap: Tensor, x: Tensor, points: Tensor, others: Tensor, rank: Tensor) -> None:
    """Lower the gaps of some points to their distance to the nearest denser one of some others."""
    distance = torch.cdist(x[points].double(), x[others].double()) / x.shape[1] ** 0.5
    distance.masked_fill_(rank[others] >= rank[points, None], math.inf)
    gap[points] = torch.minimum(gap[points], distance.amin(dim=1))


def _rows(x: Tensor, columns: int) -> int:
    """Points to compare with `columns` others at once, so that neither they nor the distances take much memory."""
    return max(1, HELD // max(columns, x.shape[1]))
