import pytest
import torch

from codebook.building.candidates import candidates, ranks
from codebook.errors import CodebookError


def test_the_published_ranks_of_576():
    one_based = [r + 1 for r in ranks(576)]
    starts = (37, 73, 145, 217, 289, 361, 433, 505, 569)
    assert one_based == [*range(1, 25), *(s + i for s in starts for i in range(8))]
    assert len(one_based) == 96


@pytest.mark.parametrize("n", [9, 36, 144, 256, 729, 1024])
def test_other_sizes_are_in_proportion(n):
    chosen = ranks(n)
    assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] < n
    if n >= 144:
        assert len(chosen) == pytest.approx(n / 6, rel=0.15)


def test_ranks_are_by_similarity_to_cls():
    generator = torch.Generator().manual_seed(0)
    patches, cls = torch.randn(576, 16, generator=generator), torch.randn(16, generator=generator)
    similarity = torch.tensor([torch.dot(p, cls) / p.norm() / cls.norm() for p in patches])
    rank = {int(i): r for r, i in enumerate(similarity.argsort(descending=True))}
    chosen = candidates("auto", (24, 24), patches, cls).tolist()
    assert chosen == sorted(chosen)
    assert sorted(rank[i] for i in chosen) == ranks(576)


def test_tiles_and_all():
    patches = torch.randn(36, 4)
    assert candidates("auto", (6, 6), patches, None).tolist() == [7, 10, 25, 28]
    assert len(candidates("tiles", (27, 27), torch.randn(729, 4), None)) == 81
    assert candidates("tiles", (14, 14), torch.randn(196, 4), None)[-1] == 10 * 14 + 10  # whole tiles only
    assert candidates("all", (6, 6), patches, None).tolist() == list(range(36))
    with pytest.raises(CodebookError, match="no \\[CLS\\] token"):
        candidates("ranks", (6, 6), patches, None)
