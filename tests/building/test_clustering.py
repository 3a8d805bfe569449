import sys

import numpy as np
import pytest
import torch

from codebook.building import clustering
from codebook.building.clustering import dpc_knn
from codebook.building.pool import recurrent


def by_loops(x: np.ndarray, clusters: int, k: int) -> list[int]:
    """DPC-KNN written out point by point, without the tie-break."""
    n, d = x.shape
    distance = [[float(np.sqrt(((x[i] - x[j]) ** 2).sum()) / np.sqrt(d)) for j in range(n)] for i in range(n)]
    density = [float(np.exp(-np.mean([v**2 for v in sorted(row)[:k]]))) for row in distance]
    longest = max(map(max, distance))
    gap = [min((distance[i][j] for j in range(n) if density[j] > density[i]), default=longest) for i in range(n)]
    centres = sorted(range(n), key=lambda i: -gap[i] * density[i])[:clusters]
    return [
        centres.index(i) if i in centres else min(range(len(centres)), key=lambda c: distance[i][centres[c]])
        for i in range(n)
    ]


@pytest.mark.parametrize(("n", "d", "clusters", "k"), [(40, 8, 5, 5), (96, 32, 8, 5), (7, 3, 3, 3), (30, 4, 64, 5)])
def test_agrees_with_loops(n, d, clusters, k):
    x = np.random.default_rng(n).normal(size=(n, d)).astype(np.float32)
    assert dpc_knn(torch.from_numpy(x), clusters, k).tolist() == by_loops(x.astype(np.float64), clusters, k)


def test_by_hand():
    # On a line, k = 2, so a density is exp(-(nearest distance)^2 / 2). Densest of the left group is 0 or 1 (0.1
    # apart), of the right 10 or 11; 5 is far from all: the two gaps between groups are the peaks, then 5's.
    x = torch.tensor([[0.0], [0.1], [0.4], [10.0], [10.2], [10.6], [5.0]])
    assert dpc_knn(x, 2, neighbours=2).tolist()[:6] in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])


def test_twins_do_not_take_a_peak():
    left, right = torch.zeros(6, 64), torch.ones(4, 64)
    for seed in range(20):
        labels = dpc_knn(torch.cat([left, right]), 2, seed=seed)
        assert len(set(labels[:6].tolist())) == len(set(labels[6:].tolist())) == 1
        assert labels[0] != labels[9]


def test_blocks_change_nothing(monkeypatch):
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    whole = dpc_knn(x, 6)
    monkeypatch.setattr(clustering, "HELD", 350)
    assert torch.equal(dpc_knn(x, 6), whole)


def test_few_points():
    assert dpc_knn(torch.empty(0, 4), 8).tolist() == []
    assert dpc_knn(torch.randn(1, 4), 8).tolist() == [0]
    assert sorted(dpc_knn(torch.randn(3, 4), 8).tolist()) == [0, 1, 2]


def test_recurrent_counts_distinct_images_strictly():
    labels, images = [0, 0, 0, 1, 1, 2], ["a", "b", "b", "a", "b", "c"]
    assert recurrent(labels, images, 3, 1 / 3) == [0, 1, 2, 3, 4]  # more than 1 image
    assert recurrent(labels, images, 3, 2 / 3) == []  # not more than 2
    assert recurrent([0] * 65, [str(i) for i in range(65)], 500, 64 / 500) == list(range(65))
    assert recurrent([0] * 64, [str(i) for i in range(64)], 500, 64 / 500) == []


def blobs(n, d=16, centres=20, seed=0):
    """Points around centres of different size and spread, as survivors of many images are."""
    random = np.random.default_rng(seed)
    where = random.normal(size=(centres, d)) * 4
    which = random.choice(centres, n, p=random.dirichlet(np.ones(centres)))
    spread = random.uniform(0.3, 1.5, centres)[which, None]
    return torch.from_numpy((where[which] + spread * random.normal(size=(n, d))).astype(np.float32))


def plain(x, clusters, k=5, seed=0):
    """DPC-KNN on the whole matrix of distances."""
    distance = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    noise = torch.rand(len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spread = (distance.topk(k, largest=False).values ** 2).mean(dim=1)
    density = (-spread).exp() + clustering.DENSITY_NOISE * noise
    gap = distance.masked_fill(density[None] <= density[:, None], distance.max()).amin(dim=1)
    centres = (gap * density).argsort(descending=True)[:clusters]
    return distance[:, centres].argmin(dim=1)


@pytest.mark.parametrize("clusters", [1, 8, 64])
@pytest.mark.parametrize("block", [16, 1024])
def test_early_stop_is_exact(monkeypatch, clusters, block):
    monkeypatch.setattr(clustering, "PEAK_BLOCK", block)
    for seed, x in enumerate((blobs(1500), torch.randn(700, 32, generator=torch.Generator().manual_seed(0)))):
        assert torch.equal(dpc_knn(x, clusters, seed=seed), plain(x, clusters, seed=seed))


@pytest.mark.parametrize("faiss", [True, False])
def test_many_points_agree_with_few(monkeypatch, faiss):
    """At a size where both run, the search by inverted file finds the same clusters as all pairs do."""
    if faiss:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    x = blobs(4000, 32)
    assert torch.equal(dpc_knn(x, 16, exact=0), dpc_knn(x, 16))
    few = dpc_knn(x[:3], 8, exact=0)
    assert sorted(few.tolist()) == [0, 1, 2]


def test_many_equal_points():
    x = torch.cat([torch.zeros(300, 8), torch.ones(200, 8), torch.full((5, 8), 2.0)])
    for exact in (0, 1000):
        labels = dpc_knn(x, 3, exact=exact)
        assert [len(set(part.tolist())) for part in labels.split([300, 200, 5])] == [1, 1, 1]
        assert len(set(labels.tolist())) == 3
