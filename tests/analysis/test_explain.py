"""Tokens compared with a codebook, worked out by hand."""

import pytest
import torch

from codebook import RedundancyCodebook, VisualTokens
from codebook.analysis.explain import explain_tokens
from codebook.store.codebook import Codebook


def test_ranks_ties_and_neighbours():
    """Cosines to the axes are the coordinates of unit vectors; of equal tokens the last is dropped first."""
    provenance = [{"image": "a.png", "row": 1, "col": 2, "cluster": 7}, {"cluster": 7}, {"cluster": 3}]
    book = Codebook(torch.eye(3), provenance)
    features = torch.tensor(
        [[0.6, 0.8, 0, 9], [0, 0, 1, 9], [0.6, 0.8, 0, 9], [0.48, 0.6, 0.64, 9]]
    )  # 9: deeper layers
    found = explain_tokens(book, features, (2, 2), [3, 0, 2, 1], neighbours=2)
    assert [one.patch for one in found] == [(1, 1), (0, 0), (1, 0), (0, 1)]
    assert [one.rank for one in found] == [4, 3, 2, 1]
    assert [one.similarity for one in found] == pytest.approx([0.64, 0.8, 0.8, 1.0])
    assert [near["similarity"] for near in found[1].neighbours] == pytest.approx([0.8, 0.6])
    assert [near["cluster_size"] for near in found[0].neighbours] == [1, 2]
    assert found[1].neighbours[1] | {"similarity": 0} == provenance[0] | {"similarity": 0, "cluster_size": 2}
    for count in (1, 3):  # 2 would part the equal ones
        kept = RedundancyCodebook(book).select(VisualTokens.of(features[:, :3]), count).tolist()
        assert kept == sorted(one.patch[0] * 2 + one.patch[1] for one in found if one.kept(count))


def test_more_neighbours_than_prototypes():
    book = Codebook(torch.eye(3))
    assert len(explain_tokens(book, torch.eye(3), (1, 3), [1], neighbours=5)[0].neighbours) == 3
