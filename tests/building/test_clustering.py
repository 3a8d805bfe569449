import numpy as np
import pytest
import torch

from codebook import density
from codebook.building.builder import recurrent
from codebook.building.clustering import dpc_knn


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
    monkeypatch.setattr(density, "ROWS", 7)
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
