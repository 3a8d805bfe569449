"""Density-peaks clustering by nearest neighbours (DPC-KNN), as the redundancy codebook uses it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

DENSITY_NOISE = 1e-6
"""Largest of the random numbers that are added to the densities, so that no two are equal."""
EXACT = 20_000
"""Points up to which every neighbour is found by comparing all pairs: 81 s on one core for d = 1024."""
HELD = 2**24
"""Distances held at once: 128 MiB in float64, whatever the number of points."""
PEAK_BLOCK = 1024
"""Points that the others are compared with at once, taken in the order of their densities."""
PROBED = 64
"""Lists of an inverted file, of 4 sqrt(n), that are searched for a point's neighbours. At 20 000 points: recall 1.0 of
visual tokens (d = 160), 0.98 to 1.0 of synthetic clusters (d = 32, 1024)."""


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
    search, wanted = _searcher(x.float(), seed), min(2 * k, len(x))
    square = torch.empty(len(x), wanted, dtype=torch.float64)
    index = torch.empty(len(x), wanted, dtype=torch.int64)
    for start in range(0, len(x), rows := max(1, HELD // (4 * wanted * x.shape[1]))):
        rows_here = torch.arange(start, min(start + rows, len(x)))[:, None]
        found = search(x[start : start + rows].float(), wanted)
        found[:, -1] = torch.where((found == rows_here).any(dim=1), found[:, -1], rows_here[:, 0])
        found = torch.where(found < 0, rows_here, found)  # fewer points in the lists searched than asked for
        distance = (x[found].double() - x[rows_here].double()).square().sum(dim=2) / x.shape[1]
        nearest = distance.sort(dim=1, stable=True)
        square[start : start + rows], index[start : start + rows] = nearest.values, found.gather(1, nearest.indices)
    return square, index


def _searcher(x: Tensor, seed: int) -> Callable[[Tensor, int], Tensor]:
    """A function of queries (m, d) and k that finds the nearest of `x`, nearest first: (m, k) int64, -1 for none."""
    try:
        import faiss
    except ImportError:
        return partial(_all_pairs, x)
    lists = min(int(4 * len(x) ** 0.5), len(x))
    index: Any = faiss.index_factory(x.shape[1], f"IVF{lists},SQfp16")  # half precision: half of the features' memory
    index.cp.seed, index.cp.niter = seed, 10
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 40
    index.nprobe = PROBED
    index.train(x.numpy())
    for part in x.split(PEAK_BLOCK):
        index.add(part.numpy())
    return lambda query, k: torch.from_numpy(index.search(query.numpy(), k)[1])


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

    The points are taken in blocks, the densest first. A point's distance to any denser point bounds its gap from
    above, and the points of the blocks taken have their final one: once a bound cannot reach the `count`-th best of
    those, the point is dropped. After a few blocks hardly any is left.

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
    left, final, least = order, order[:0], -math.inf
    for start in range(0, len(x), PEAK_BLOCK):
        block = order[start : start + PEAK_BLOCK]
        taken = int((rank[left] < start + PEAK_BLOCK).sum())
        inside, beyond = left[:taken], left[taken:]
        _narrow(gap, x, inside, block, rank)
        final = torch.cat([final, inside])
        if len(final) >= count:
            least = float((gap * density)[final].topk(count).values[-1])
        beyond = beyond[(gap * density)[beyond] >= least]
        _narrow(gap, x, beyond, block, rank)
        left = beyond[(gap * density)[beyond] >= least]
        if not len(left) and len(final) >= count:
            break
    final = final.sort().values
    return final[(gap * density)[final].argsort(descending=True, stable=True)[:count]]


def _narrow(gap: Tensor, x: Tensor, points: Tensor, block: Tensor, rank: Tensor) -> None:
    """Lower the gaps of some points to their distance to the nearest denser one in a block of points."""
    denser = x[block].double()
    for part in points.split(_rows(x, len(block))):
        distance = torch.cdist(x[part].double(), denser) / x.shape[1] ** 0.5
        distance.masked_fill_(rank[block] >= rank[part, None], math.inf)
        gap[part] = torch.minimum(gap[part], distance.amin(dim=1))


def _rows(x: Tensor, columns: int) -> int:
    """Points to compare with `columns` others at once, so that neither they nor the distances take much memory."""
    return max(1, HELD // max(columns, x.shape[1]))
