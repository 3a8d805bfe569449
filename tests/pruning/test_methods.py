"""What each method selects, by hand-worked examples."""

from dataclasses import replace

import pytest
import torch

from codebook.errors import CodebookError
from codebook.pruning import (
    Alpha,
    DivPrune,
    Random,
    RedundancyCodebook,
    ScoringPruner,
    Uniform,
    Union,
    VisualTokens,
    Window,
)


def tokens(rows, cols, features=None, key=0, text=None, **options):
    """An image's tokens, and after them in the sequence the text (T, d), by default one word of zeros."""
    n = rows * cols
    features = torch.zeros(n, 2) if features is None else features
    text = features.new_zeros(1, features.shape[1]) if text is None else text
    sequence, question = torch.cat([features, text]), n + torch.arange(len(text))
    return VisualTokens(
        features, features, sequence, slice(0, n), question, torch.arange(n), (rows, cols), torch.tensor(key), **options
    )


class Book:
    """Two prototypes, [1, 0] and [0, 2]: only directions matter."""

    def redundancy(self, features):
        prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        return (torch.nn.functional.normalize(features, dim=-1) @ prototypes.T).amax(-1)


def test_codebook_keeps_what_is_least_like_any_prototype():
    # cosines to the nearest prototype: 1, 1, 0.707, 0.8, 0, -0.707
    features = torch.tensor([[3.0, 0.0], [0.0, 0.1], [5.0, 5.0], [3.0, 4.0], [-7.0, 0.0], [-1.0, -1.0]])
    pruner = RedundancyCodebook(Book())
    assert pruner.select(tokens(2, 3, features), 1).tolist() == [5]
    assert pruner.select(tokens(2, 3, features), 3).tolist() == [2, 4, 5]
    assert pruner.select(tokens(2, 3, features), 4).tolist() == [2, 3, 4, 5]


def test_uniform_takes_the_centres_of_equal_cells():
    # 6 x 6 in 2 x 2 cells of 3 x 3: centres at rows and columns 1 and 4
    assert Uniform().select(tokens(6, 6), 4).tolist() == [7, 10, 25, 28]
    # 12 x 12 at 16: rows and columns 1, 4, 7, 10
    side = [1, 4, 7, 10]
    assert Uniform().select(tokens(12, 12), 16).tolist() == [12 * r + c for r in side for c in side]
    # 27 x 27 at 81: the stride-3 grid of FEATHER
    side = range(1, 27, 3)
    assert Uniform().select(tokens(27, 27), 81).tolist() == [27 * r + c for r in side for c in side]


@pytest.mark.parametrize("rows,cols", [(12, 12), (1, 9), (9, 1), (3, 10), (24, 24)])
def test_uniform_has_any_count(rows, cols):
    for keep in range(1, rows * cols + 1):
        chosen = Uniform().select(tokens(rows, cols), keep)
        assert len(chosen) == keep and (chosen.diff() > 0).all() and chosen[-1] < rows * cols and chosen[0] >= 0


def test_uniform_covers_the_image():
    """No token is further from a kept one than the diagonal of a cell, at any count."""
    row, col = torch.arange(144) // 12, torch.arange(144) % 12
    for keep in range(4, 145):
        chosen = Uniform().select(tokens(12, 12), keep)
        gap = torch.maximum((row[:, None] - row[chosen]).abs(), (col[:, None] - col[chosen]).abs()).amin(1).max()
        assert gap <= 2 * (144 / keep) ** 0.5


def test_uniform_on_survivors_takes_every_nth():
    some = replace(tokens(1, 8), ordinal=torch.arange(8) * 3, grid=(6, 6))
    assert Uniform().select(some, 4).tolist() == [1, 3, 5, 7]


def test_random_is_seeded_uniform_and_differs_between_samples():
    one = Random(0).select(tokens(12, 12, key=5), 16)
    assert torch.equal(one, Random(0).select(tokens(12, 12, key=5), 16))
    assert not torch.equal(one, Random(1).select(tokens(12, 12, key=5), 16))
    assert not torch.equal(one, Random(0).select(tokens(12, 12, key=6), 16))
    hits = torch.zeros(144)
    for key in range(4000):
        hits[Random(0).select(tokens(12, 12, key=key), 16)] += 1
    expected, spread = 4000 * 16 / 144, (4000 * 16 / 144 * (1 - 16 / 144)) ** 0.5
    assert ((hits - expected).abs() < 5 * spread).all()


def test_random_keeps_a_token_whatever_else_is_left():
    """A token's rank depends on its own place only: nested stages keep nested sets."""
    whole = tokens(12, 12, key=9)
    wide, narrow = Random(0).select(whole, 60), Random(0).select(whole, 20)
    left = replace(whole, ordinal=wide)
    assert torch.equal(wide[Random(0).select(left, 20)], narrow)


def test_a_pruner_that_breaks_its_contract_is_found_out():
    from codebook.pruning import Pruner, Schedule, Stage
    from tests.pruning.test_equivalence import ONE, prompt
    from tests.tiny import llava

    class Greedy(Pruner):
        def select(self, tokens, keep):
            return torch.arange(keep + 1)

    model = llava()
    with (
        torch.no_grad(),
        Schedule([Stage(0, 5, Greedy())])(model),
        pytest.raises(CodebookError, match="Greedy chose"),
    ):
        model(**prompt(model, ONE))


def test_divprune_by_hand():
    # unit vectors at 0, 10, 90 and 180 degrees: cosine to the nearest other one is .98, .98, .17, 0 (to 90)
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 90.0, 180.0]))
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5.0], [0.2], [3.0]])
    four = tokens(2, 2, features)
    assert DivPrune().select(four, 1).tolist() == [3]
    assert DivPrune().select(four, 2).tolist() == [0, 3]  # then the one furthest from 180 degrees
    assert DivPrune().select(four, 3).tolist() == [0, 2, 3]


def test_divprune_equals_the_textbook_loop():
    features = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    distance = 1 - torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    others = [[j for j in range(60) if j != i] for i in range(60)]
    chosen = [max(range(60), key=lambda i: min(distance[i][j].item() for j in others[i]))]
    for _ in range(19):
        left = [i for i in range(60) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance[i][j].item() for j in chosen)))
    assert DivPrune().select(tokens(6, 10, features), 20).tolist() == sorted(chosen)


def test_divprune_never_picks_a_token_twice():
    same = tokens(4, 4, torch.ones(16, 3))
    assert DivPrune().select(same, 16).tolist() == list(range(16))


class Ranking(ScoringPruner):
    """Scores as given."""

    def __init__(self, *scores):
        self.scores = torch.tensor(scores, dtype=torch.float32)

    def score(self, tokens):
        return self.scores[tokens.ordinal].clone()


def test_union_is_a_grid_filled_up_by_a_ranking():
    # the grid's two of 1 x 8 are 2 and 6; the ranking's best others are 7, then 1
    ranking = Ranking(0, 5, 9, 1, 2, 3, 8, 7)
    assert Union(Uniform(), ranking, share=0.5).select(tokens(1, 8), 4).tolist() == [1, 2, 6, 7]
    assert Union(Uniform(), ranking, share=0).select(tokens(1, 8), 2).tolist() == [2, 6]
    assert Union(Uniform(), Ranking(*range(8)), share=1).select(tokens(1, 8), 2).tolist() == [2, 6]


def test_window_keeps_as_many_in_each():
    # 2 x 4 in two windows of 2 x 2; all high scores are in the left one
    ranking = Ranking(9, 8, 1, 2, 7, 6, 4, 3)
    assert Window(ranking, (1, 2)).select(tokens(2, 4), 2).tolist() == [0, 6]
    assert Window(ranking, (1, 2)).select(tokens(2, 4), 4).tolist() == [0, 1, 6, 7]
    assert Window(ranking, (1, 2)).select(tokens(2, 4), 5).tolist() == [
        0,
        1,
        4,
        6,
        7,
    ]  # 4 beats what the right has left


def test_alpha_weighs_importance_against_likeness_to_the_last_token():
    class Attention:
        def row(self, query, **options):
            return torch.tensor([0.1, 0.2, 0.3])  # scaled: 0, 0.5, 1

    hidden = torch.tensor([[0.0, 2.0], [1.0, 0.0], [5.0, 0.0]])  # cosine to the last token 0, 1, 1: uniqueness 1, 0, 0
    three = tokens(1, 3, hidden, text=torch.tensor([[3.0, 0.0]]), attention=Attention())
    assert Alpha(1.0).score(three).tolist() == pytest.approx([0, 0.5, 1])
    assert Alpha(0.0).score(three).tolist() == pytest.approx([1, 0, 0])
    assert Alpha(0.25).score(three).tolist() == pytest.approx([0.75, 0.125, 0.25])
