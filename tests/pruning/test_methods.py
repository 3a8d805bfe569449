"""What each method selects, by hand-worked examples."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Identity

from codebook.errors import CodebookError
from codebook.pruning import (
    Alpha,
    CDPruner,
    Cls,
    Dart,
    DensityPeaks,
    DivPrune,
    Downsample,
    Drop,
    FarthestPoint,
    FastV,
    Merged,
    Pool,
    Pruner,
    Random,
    RedundancyCodebook,
    RedundancyThreshold,
    Schedule,
    SeededFarthestPoint,
    SparseVLM,
    Stage,
    Uniform,
    Union,
    VisionZip,
    VisualTokens,
    Weighted,
    Window,
)
from codebook.pruning.attention import Attention, Vision
from codebook.pruning.engine import selection
from codebook.pruning.methods import base, farthest
from codebook.pruning.methods.base import FeaturePruner, FramePruner, ScoringPruner, nearest_kept
from tests.prompts import ONE, RAGGED, prompt, size
from tests.pruning.made import Ranking, tokens
from tests.tiny import llava


class Book:
    """Two prototypes, [1, 0] and [0, 2]: only directions matter."""

    def redundancy(self, features):
        prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        return (torch.nn.functional.normalize(features, dim=-1) @ prototypes.T).amax(-1)

    def similarity(self, features):
        return features.log()


def test_codebook_keeps_what_is_least_like_any_prototype():
    # cosines to the nearest prototype: 1, 1, 0.707, 0.8, 0, -0.707
    features = torch.tensor([[3.0, 0.0], [0.0, 0.1], [5.0, 5.0], [3.0, 4.0], [-7.0, 0.0], [-1.0, -1.0]])
    pruner = RedundancyCodebook(Book())
    assert pruner.select(tokens(2, 3, features), 1).tolist() == [5]
    assert pruner.select(tokens(2, 3, features), 3).tolist() == [2, 4, 5]
    assert pruner.select(tokens(2, 3, features), 4).tolist() == [2, 3, 4, 5]


def test_threshold_keeps_as_many_as_are_below_it():
    # the same cosines: 1, 1, 0.707, 0.8, 0, -0.707
    features = torch.tensor([[3.0, 0.0], [0.0, 0.1], [5.0, 5.0], [3.0, 4.0], [-7.0, 0.0], [-1.0, -1.0]])
    assert RedundancyThreshold(Book(), threshold=0.75).choose(tokens(2, 3, features)).tolist() == [2, 4, 5]
    assert RedundancyThreshold(Book(), threshold=0.9).choose(tokens(2, 3, features)).tolist() == [2, 3, 4, 5]
    assert RedundancyThreshold(Book(), threshold=-0.9).choose(tokens(2, 3, features)).tolist() == [5]  # at least one


def test_double_softmax_by_hand():
    # The stub takes logarithms, so softmax divides each number by its column's sum (6) or its row's (4):
    # 1/6*1/4 3/6*3/4 | 3/6*3/4 1/6*1/4 | 2/6*2/4 2/6*2/4, the highest of a token 9/24, 9/24, 4/24
    three = tokens(1, 3, torch.tensor([[1.0, 3.0], [3.0, 1.0], [2.0, 2.0]]))
    pruner = RedundancyCodebook(Book(), scoring="double_softmax")
    assert pruner.score(three).tolist() == pytest.approx([-9 / 24, -9 / 24, -4 / 24])
    assert pruner.select(three, 1).tolist() == [2]


def test_uniform_takes_the_centres_of_equal_cells():
    # 6 x 6 in 2 x 2 cells of 3 x 3: centres at rows and columns 1 and 4
    assert Uniform().select(tokens(6, 6), 4).tolist() == [7, 10, 25, 28]
    # 12 x 12 at 16: rows and columns 1, 4, 7, 10
    side = [1, 4, 7, 10]
    assert Uniform().select(tokens(12, 12), 16).tolist() == [12 * r + c for r in side for c in side]
    # 27 x 27 at 81: every third, from the second on
    side = range(1, 27, 3)
    assert Uniform().select(tokens(27, 27), 81).tolist() == [27 * r + c for r in side for c in side]
    # and at 196 every second from the first, for there is no other
    side = range(0, 27, 2)
    assert Uniform().select(tokens(27, 27), 196).tolist() == [27 * r + c for r in side for c in side]


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


def test_uniform_from_the_corner():
    # 12 x 12 at 16: rows and columns 0, 3, 6, 9; at 12 rows 0, 4, 8; at 50 no whole stride has 8 columns
    side = [0, 3, 6, 9]
    pruner = Uniform(phase="corner")
    assert pruner.select(tokens(12, 12), 16).tolist() == [12 * r + c for r in side for c in side]
    assert pruner.select(tokens(12, 12), 12).tolist() == [12 * r + c for r in (0, 4, 8) for c in side]
    assert pruner.select(tokens(1, 12), 8).tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    for keep in range(1, 31):
        chosen = pruner.select(tokens(3, 10), keep)
        assert len(chosen) == keep and (chosen.diff() > 0).all() and chosen[0] == 0 and chosen[-1] < 30


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


class Greedy(Pruner):
    def select(self, tokens, keep):
        return torch.arange(keep + 1)


class Greedier(FeaturePruner):
    def select_each(self, features, keep):
        return torch.arange(keep + 2).expand(len(features), -1)


class Given(Pruner):
    """Chooses what it is given."""

    def __init__(self, choice):
        self.choice = choice

    def select(self, tokens, keep):
        return self.choice


class GivenFrames(FramePruner):
    def __init__(self, choice):
        self.choice = choice

    def select_frames(self, frames, keep):
        return [self.choice]


@pytest.mark.parametrize("kind", [Given, GivenFrames])
@pytest.mark.parametrize(
    "choice", [[5, 2, 9], [1, 1, 3], [-1, 2, 3], [3, 7, 36], torch.tensor([1, 2, 3]).int()], ids=str
)
def test_indices_that_are_no_choice(kind, choice):
    """A repeated one let padding in as a token, and one from the end chose another than it says."""
    schedule, says = (
        Schedule([Stage(0, 3, kind(torch.as_tensor(choice)))]),
        r"Given\w* chose .* of 36 tokens: give int64",
    )
    with torch.no_grad(), schedule(model := llava()), pytest.raises(CodebookError, match=says):
        model(**prompt(model, ONE))


class Sequence(ScoringPruner):
    """Scores all of the prompt's tokens."""

    def score(self, tokens):
        return tokens.sequence.float().norm(dim=1)


class One(Uniform):
    """Merges all into one value."""

    def merge(self, tokens, index):
        return tokens.hidden.mean(0)


class Halves(Uniform):
    """Groups of every second token."""

    def groups(self, tokens, index):
        return torch.zeros(len(tokens) // 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("pruner", "says"),
    [
        (Sequence(), r"Sequence gives scores of shape \(41,\) for 36 tokens: give one for each"),
        (One(), r"One merges tokens to \(48,\) values where \(3, 48\) were asked for"),
        (Halves(), r"Halves gives groups of shape \(18,\) for 36 tokens: give each its"),
        (Given([1, 2, 3]), "Given chose list tokens where 3 were asked for"),
    ],
)
def test_values_of_another_shape(pruner, says):
    model = llava()
    with torch.no_grad(), Schedule([Stage(0, 3, pruner, mass=True)])(model), pytest.raises(CodebookError, match=says):
        model(**prompt(model, ONE))


@pytest.mark.parametrize("kind", [Greedy, Greedier])
def test_a_pruner_that_breaks_its_contract_is_found_out(kind):
    model = llava()
    with torch.no_grad(), Schedule([Stage(0, 5, kind())])(model), pytest.raises(CodebookError, match=r"Greed.* chose"):
        model(**prompt(model, ONE))


def test_images_of_as_many_tokens_are_chosen_from_at_once():
    calls = []

    class First(FeaturePruner):
        def select_each(self, features, keep):
            calls.append((tuple(features.shape[:2]), keep))
            return torch.arange(keep).expand(len(features), -1)

    model = llava()
    n = size(model)
    with torch.no_grad(), Schedule([Stage(0, 8, First()), Stage(1, 3, First())])(model) as pruning:
        model(**prompt(model, RAGGED))
    images = len(pruning.kept)
    assert calls == [((images, n), 8), ((images, 8), 3)]
    assert [stages[-1].tolist() for stages in pruning.kept] == [[0, 1, 2]] * images


def test_divprune_by_hand():
    # unit vectors at 0, 10, 90 and 180 degrees: cosine to the nearest other one is .98, .98, .17, 0 (to 90)
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 90.0, 180.0]))
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5.0], [0.2], [3.0]])
    four = tokens(2, 2, features)
    assert DivPrune().select(four, 1).tolist() == [3]
    assert DivPrune().select(four, 2).tolist() == [0, 3]  # then the one furthest from 180 degrees
    assert DivPrune().select(four, 3).tolist() == [0, 2, 3]


def at(*degrees, lengths=None):
    """An image of one row whose features point in these directions."""
    angles = torch.deg2rad(torch.tensor(degrees))
    features = torch.stack([angles.cos(), angles.sin()], 1)
    return tokens(1, len(degrees), features if lengths is None else features * torch.tensor(lengths)[:, None])


def test_farthest_points_by_hand():
    # The mean points at 35.7 degrees: 0 is 36 from it, 10 is 26, 90 is 54 and is first; then 0, 90 from it; then 10.
    assert FarthestPoint().select(at(0.0, 10.0, 90.0), 1).tolist() == [2]
    assert FarthestPoint().select(at(0.0, 10.0, 90.0), 2).tolist() == [0, 2]
    # Lengths do not matter between tokens: after 180, furthest from the mean, come 60 degrees and not its twin.
    image = at(0.0, 62.0, 60.0, 2.0, 180.0, lengths=[9.0, 1.0, 1.0, 9.0, 1.0])
    assert FarthestPoint().select(image, 1).tolist() == [4]
    assert FarthestPoint().select(image, 2).tolist() == [0, 4]
    assert FarthestPoint().select(image, 3).tolist() == [0, 1, 4]  # 62: 62 from 0; 60 is nearer


def test_prototypes_count_as_chosen():
    # Prototypes at 0 and 90 degrees. To the nearest one: 5, 45, 40, 75, 90 degrees.
    image = at(-5.0, 45.0, 50.0, 165.0, 180.0, lengths=[1.0, 2.0, 3.0, 4.0, 5.0])
    pruner = SeededFarthestPoint(Book(), representatives=0)
    assert pruner.select(image, 1).tolist() == [4]
    assert pruner.select(image, 2).tolist() == [1, 4]  # 165 is now 15 from a chosen one
    assert pruner.select(image, 3).tolist() == [1, 3, 4]


def test_representatives_stand_for_the_others():
    # Prototypes at 0 and 90 degrees: 270 is furthest, then 150, then 112, which is 22 from a prototype.
    image = at(100.0, 105.0, 112.0, 150.0, 270.0)
    assert SeededFarthestPoint(Book(), representatives=0).select(image, 3).tolist() == [2, 3, 4]
    # 150 has cosines .643, .707, .788 to the first three; 105 raises them by .353 + .293 + .205 = .851, 100 by
    # .357 + .289 + .190 = .836 and 112 by .335 + .285 + .212 = .832.
    assert SeededFarthestPoint(Book(), representatives=1).select(image, 3).tolist() == [1, 3, 4]
    # At most half of what stays are representatives; after 105 another for 112, which is further from it than 100.
    assert SeededFarthestPoint(Book(), representatives=9).select(image, 3).tolist() == [1, 3, 4]
    assert SeededFarthestPoint(Book(), representatives=9).select(image, 4).tolist() == [1, 2, 3, 4]
    assert SeededFarthestPoint(Book(), representatives=9).select(image, 1).tolist() == [4]
    # Without a codebook: the mean points at 122 degrees; 270 is furthest, then 100, 170 from it, then 150.
    assert FarthestPoint().select(image, 3).tolist() == [0, 3, 4]


def test_each_chosen_token_gives_way_to_the_middle_of_what_it_stands_for():
    # The mean points at 71 degrees, so 125 is chosen first, then 20. 40 and 30 are nearest to 20, 100 and 110 to 125.
    # In these groups, in raster order 0 2 5 and 1 3 4, the middle ones are 2 and 3.
    image = at(20.0, 125.0, 40.0, 100.0, 110.0, 30.0)
    assert FarthestPoint().select(image, 2).tolist() == [0, 1]
    assert FarthestPoint(middle=True).select(image, 2).tolist() == [2, 3]
    # Without the last there are two tokens in the one group: the former stays.
    assert FarthestPoint(middle=True).select(at(20.0, 125.0, 40.0, 100.0, 110.0), 2).tolist() == [0, 3]


@pytest.mark.parametrize("pruner", [FarthestPoint(4), DivPrune(), SeededFarthestPoint(Book()), DivPrune(centred=True)])
def test_middles_are_those_of_a_plain_loop(pruner):
    features = torch.randn(3, 60, 2, generator=torch.Generator().manual_seed(5))
    chosen = replace(pruner, middle=True).select_each(features, 13)
    for own, index, found in zip(features, pruner.select_each(features, 13), chosen, strict=True):
        members: dict[int, list[int]] = {int(i): [] for i in index}
        for token in range(60):
            angles = {i: float(torch.cosine_similarity(own[token], own[i], dim=0)) for i in members}
            members[token if token in members else max(angles, key=angles.get)].append(token)
        assert found.tolist() == sorted(group[(len(group) - 1) // 2] for group in members.values())


@pytest.mark.parametrize("at_once", [25, 2**26])
def test_several_images_at_once(monkeypatch, at_once):
    monkeypatch.setattr(farthest, "AT_ONCE", at_once)
    # The images of the two tests before.
    images = [at(-5.0, 45.0, 50.0, 165.0, 180.0), at(100.0, 105.0, 112.0, 150.0, 270.0)]
    features = torch.stack([image.features for image in images])
    assert SeededFarthestPoint(Book(), 0).select_each(features, 3).tolist() == [[1, 3, 4], [2, 3, 4]]
    assert SeededFarthestPoint(Book(), 1).select_each(features, 3)[1].tolist() == [1, 3, 4]
    # -5 is 50 from its nearest, then 180, 175 from it; 270 is 120 from its nearest, then 100, 170 from it.
    assert DivPrune().select_each(features, 2).tolist() == [[0, 4], [0, 4]]


def test_equal_tokens_are_chosen_once():
    image = tokens(2, 3, torch.ones(6, 2))
    for pruner in (FarthestPoint(), FarthestPoint(3), SeededFarthestPoint(Book()), FarthestPoint(2, middle=True)):
        for keep in range(1, 7):
            assert len(set(pruner.select(image, keep).tolist())) == keep


def test_representatives_are_not_negative():
    for make in (FarthestPoint, lambda count: SeededFarthestPoint(Book(), count)):
        with pytest.raises(CodebookError, match="give 0 or more"):
            make(-1)


@pytest.mark.parametrize("at_once", [1, 2**26])
def test_units_of_any_sizes_are_counted_as_each_alone(monkeypatch, at_once):
    monkeypatch.setattr(base, "AT_ONCE", at_once)
    generator, sizes = torch.Generator().manual_seed(0), [9, 7, 9, 7, 9, 9, 9]
    images = [tokens(1, n, torch.randn(n, 4, generator=generator)) for n in sizes]
    units = [
        SimpleNamespace(mass=None, ordinal=image.ordinal, count=len(image.ordinal), row=i % 3)
        for i, image in enumerate(images)
    ]
    units[2].mass = torch.arange(1, 10)
    # Of two sizes, of one of them three keeping three and one four; one keeps all and one nothing.
    stays = [*map(torch.tensor, ([0, 4, 8], [1, 2, 6], [2, 3, 5], [0, 1, 3], [5, 6, 7, 8])), None, torch.tensor([])]
    found = masses(Stage(0, 3, Ranking(), mass=True), units, stays, images)
    assert found[5] is None and found[6] is None
    for image, unit, index, mass in zip(images[:5], units, stays, found, strict=False):
        expected = dict.fromkeys(index.tolist(), 0)
        for token in range(len(image.hidden)):
            alike = {k: float(torch.cosine_similarity(image.hidden[token], image.hidden[k], dim=0)) for k in expected}
            expected[max(alike, key=alike.get)] += 1 if unit.mass is None else int(unit.mass[token])
        assert mass.tolist() == [*expected.values()]


def test_the_kept_one_most_like_each():
    # 30 and 170 degrees are kept; a kept token has itself, also where another is its twin
    image = at(0.0, 30.0, 99.0, 101.0, 170.0, 30.0, lengths=[5.0, 1.0, 2.0, 2.0, 3.0, 1.0])
    assert nearest_kept(image.hidden, torch.tensor([1, 4])).tolist() == [0, 0, 0, 1, 1, 0]
    assert nearest_kept(image.hidden, torch.tensor([1, 5]))[[1, 5]].tolist() == [0, 1]


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


def test_union_is_a_grid_filled_up_by_a_ranking():
    # the grid's two of 1 x 8 are 2 and 6; the ranking's best others are 7, then 1
    ranking = Ranking(0, 5, 9, 1, 2, 3, 8, 7)
    assert Union(Uniform(), ranking, share=0.5).select(tokens(1, 8), 4).tolist() == [1, 2, 6, 7]
    assert Union(Uniform(), ranking, share=0).select(tokens(1, 8), 2).tolist() == [2, 6]
    assert Union(Uniform(), Ranking(*range(8)), share=1).select(tokens(1, 8), 2).tolist() == [2, 6]


def test_parts_ask_one_layer():
    assert Union(Uniform(), FastV(own_layer=True)).own_layer and not Union(Uniform(), FastV()).own_layer
    with pytest.raises(CodebookError, match="give all parts that ask the same own_layer"):
        _ = Weighted([FastV(own_layer=True), FastV()], [1, 1]).own_layer


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


def test_union_is_the_papers_where_size_and_share_are():
    """FEATHER's ensemble: the top 182 of 27 x 27 and the stride-3 grid."""
    ranking = Ranking(*torch.randperm(729, generator=torch.Generator().manual_seed(0)).tolist())
    side = range(0, 27, 3)
    expected = {27 * r + c for r in side for c in side} | set(ranking.scores.topk(182).indices.tolist())
    chosen = Union(Uniform(phase="corner"), ranking, share=81 / len(expected)).select(tokens(27, 27), len(expected))
    assert chosen.tolist() == sorted(expected)


def test_weighted_adds_scaled_scores():
    # scaled: 0 0.5 1 and 1 0 0.5; with weights 1 and 0.4: 0.4 0.5 1.2
    pruner = Weighted([Ranking(0, 5, 10), Ranking(3, 1, 2)], [1, 0.4])
    assert pruner.score(tokens(1, 3)).tolist() == pytest.approx([0.4, 0.5, 1.2])
    assert pruner.select(tokens(1, 3), 2).tolist() == [1, 2]
    assert Weighted([FastV(), Cls()], [1, 1]).uses_attention and Weighted([FastV(), Cls()], [1, 1]).uses_vision
    with pytest.raises(CodebookError, match="one for each"):
        Weighted([Random()], [1, 2])


def test_alpha_weighs_importance_against_likeness_to_the_last_token():
    class Attention:
        def row(self, query, **options):
            return torch.tensor([0.1, 0.2, 0.3])  # scaled: 0, 0.5, 1

    hidden = torch.tensor([[0.0, 2.0], [1.0, 0.0], [5.0, 0.0]])  # cosine to the last token 0, 1, 1: uniqueness 1, 0, 0
    three = tokens(1, 3, hidden, text=torch.tensor([[3.0, 0.0]]), attention=Attention())
    assert Alpha(1.0).score(three).tolist() == pytest.approx([0, 0.5, 1])
    assert Alpha(0.0).score(three).tolist() == pytest.approx([1, 0, 0])
    assert Alpha(0.25).score(three).tolist() == pytest.approx([0.75, 0.125, 0.25])


def weights(*rows):
    """(heads, P, 2) keys of which a query [1, 0] makes the given attention weights, up to their sum."""
    return torch.stack([torch.tensor(row).log() for row in rows])[..., None] * torch.tensor([1.0, 0.0])


def test_fastv_by_hand():
    # a word, two visual tokens, a last word; two heads. Over all four: 2/8 1/8 and 1/8 5/8; over the image: 2/3 1/3
    # and 1/6 5/6; the last visual token sees three: 2/4 1/4 and 1/7 5/7
    key = weights([1.0, 2.0, 1.0, 4.0], [1.0, 1.0, 5.0, 1.0])
    query = torch.tensor([1.0, 0.0]).expand(2, 4, 2)
    attention = Attention(query, key, torch.ones(4, 2), torch.zeros(4, 2), 1.0, slice(1, 3))
    two = tokens(1, 2, attention=attention)
    assert FastV().score(two).tolist() == pytest.approx([3 / 16, 6 / 16])
    assert FastV(image_only=True).score(two).tolist() == pytest.approx([5 / 12, 7 / 12])
    assert FastV(query="visual").score(two).tolist() == pytest.approx([9 / 28, 27 / 56])
    assert FastV().select(two, 1).tolist() == [1] and FastV(reverse=True).select(two, 1).tolist() == [0]


def test_fastv_by_all_text_by_hand():
    # two visual tokens, two words; two heads. The first word gives 1/8 3/8 and 3/40 1/40, the last 1/80 3/80, 3/60 1/60
    key = weights([1.0, 3.0, 4.0, 72.0], [3.0, 1.0, 36.0, 20.0])
    query = torch.tensor([1.0, 0.0]).expand(2, 4, 2)
    attention = Attention(query, key, torch.ones(4, 2), torch.zeros(4, 2), 1.0, slice(0, 2))
    two = tokens(1, 2, text=torch.zeros(2, 2), attention=attention)
    assert FastV().score(two).tolist() == pytest.approx([1 / 32, 13 / 480])
    assert FastV(query="question").score(two).tolist() == pytest.approx([1 / 32 + 1 / 10, 13 / 480 + 1 / 5])
    assert FastV().select(two, 1).tolist() == [0] and FastV(query="question").select(two, 1).tolist() == [1]


def masses(stage, units, stays, images):
    """`selection.masses` of images that stand behind each other in the rows of a batch."""
    hidden = torch.zeros(3, 50, images[0].hidden.shape[1])
    places, ends = [], [1, 1, 1]
    for unit, image in zip(units, images, strict=True):
        places.append(ends[unit.row] + torch.arange(unit.count))
        ends[unit.row] += unit.count + 1
        hidden[unit.row, places[-1]] = image.hidden
    return selection.masses(stage, units, stays, hidden, places, lambda i: images[i])


def test_merged_by_hand():
    # Chosen are the first and the last. Most like the first are the second and the fourth, so that it moves to the
    # middle of 0 1 3; of 2 4 5 that is 4.
    features = torch.tensor([[1.0, 0.0], [2.0, 0.2], [0.1, 3.0], [3.0, 0.1], [0.0, 6.0], [0.0, 3.0]])
    six, pruner = tokens(2, 3, features), Merged(Ranking(9, 2, 3, 4, 5, 8))
    index = pruner.select(six, 2)
    assert index.tolist() == [1, 4] and pruner.groups(six, index).tolist() == [0, 0, 1, 0, 1, 1]
    assert torch.allclose(pruner.merge(six, index), torch.tensor([[2.0, 0.1], [0.1 / 3, 4.0]]))
    # With `mass` they stand for their groups, as many as an earlier stage has left each member
    stage, unit = Stage(0, 2, pruner, mass=True), SimpleNamespace(mass=None, ordinal=six.ordinal, count=6, row=0)
    assert masses(stage, [unit], [index], [six])[0].tolist() == [3, 3]
    unit.mass = torch.tensor([1, 2, 1, 1, 1, 4])
    assert masses(stage, [unit], [index], [six])[0].tolist() == [4, 6]
    # Groups 0 5 and 1 2 3 4: of an even number the former of the two in the middle
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0], [1.0, 0.1]])
    six, pruner = tokens(2, 3, features), Merged(Ranking(9, 0, 0, 0, 8, 0))
    index = pruner.select(six, 2)
    assert index.tolist() == [0, 2] and pruner.groups(six, index).tolist() == [0, 1, 1, 1, 1, 0]
    # Groups 0 4 5 and 1 2 3: the first one's middle comes last
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [2.0, 0.0], [3.0, 0.0]])
    six, pruner = tokens(2, 3, features), Merged(Ranking(9, 8, 0, 0, 0, 0))
    index = pruner.select(six, 2)
    assert index.tolist() == [2, 4] and pruner.groups(six, index).tolist() == [1, 0, 0, 0, 1, 1]
    assert pruner.merge(six, index).tolist() == [[0, 2], [2, 0]]


def test_cls_by_hand():
    # [CLS] and three patches: 1/8 2/8 4/8 and 3/8 1/8 1/8, over the two heads 4/16 3/16 5/16
    key, query = weights([1.0, 1.0, 2.0, 4.0], [3.0, 3.0, 1.0, 1.0]), torch.zeros(2, 4, 2)
    query[:, 0, 0] = 1
    three = tokens(1, 3, vision=Vision(query, key, 1.0, True))
    assert Cls().score(three).tolist() == pytest.approx([4 / 16, 3 / 16, 5 / 16])
    assert Cls().select(three, 2).tolist() == [0, 2]
    some = replace(three, ordinal=torch.tensor([1, 2]))
    assert Cls().score(some).tolist() == pytest.approx([3 / 16, 5 / 16])


def test_attention_received_by_hand_where_there_is_no_cls():
    # one patch attends 1/4 3/4, the other, whose query is zero, 1/2 1/2
    query = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    two = tokens(1, 2, vision=Vision(query, weights([1.0, 3.0]), 1.0, False))
    assert Cls().score(two).tolist() == pytest.approx([3 / 8, 5 / 8])


def test_pool_by_hand():
    # 4 x 4 numbered in raster order, 2 x 2 cells: (0+1+4+5)/4 and so on, at the tokens right below their centres
    grid = tokens(4, 4, torch.arange(16.0)[:, None])
    index = Pool().select(grid, 4)
    assert index.tolist() == [5, 7, 13, 15]
    assert Pool().merge(grid, index).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    # survivors 0, 1 and 8 of a row of nine: 0 and 8 are kept, 1 is nearer to 0
    some = replace(tokens(1, 3, torch.tensor([[0.0], [1.0], [8.0]])), ordinal=torch.tensor([0, 1, 8]), grid=(1, 9))
    assert Pool().merge(some, Pool().select(some, 2)).flatten().tolist() == [0.5, 8.0]


@pytest.mark.parametrize("rows,cols,down,across", [(6, 6, 2, 2), (6, 6, 3, 3), (24, 24, 12, 12), (24, 24, 8, 8)])
def test_pool_is_average_pooling_where_the_grid_divides(rows, cols, down, across):
    features = torch.randn(rows * cols, 5, generator=torch.Generator().manual_seed(0))
    grid = tokens(rows, cols, features)
    pooled = torch.nn.functional.avg_pool2d(features.T.view(5, rows, cols), (rows // down, cols // across))
    values = Pool().merge(grid, Pool().select(grid, down * across))
    assert torch.allclose(values, pooled.flatten(1).T, atol=1e-6)


def test_downsample_takes_the_size_of_nearest_aspect():
    def encode(rows, cols):
        asked.append((rows, cols))
        return torch.full((rows * cols, 2), float(cols))

    asked = []
    square, wide = tokens(6, 6, encode=encode), tokens(4, 8, encode=encode)
    assert Downsample().select(square, 4).tolist() == [7, 10, 25, 28]  # the uniform grid's
    for image, keep in ((square, 4), (square, 6), (wide, 8), (wide, 3), (square, 36)):
        index = Downsample().select(image, keep)
        assert len(index) == keep and Downsample().merge(image, index).shape == (keep, 2)
    # 6 is 2 x 3 as well as 3 x 2; 8 is of the wide grid's aspect as 2 x 4; 3 as 1 x 3 is 1.5 times too wide
    assert asked == [(2, 2), (2, 3), (2, 4), (1, 3), (6, 6)]
    with pytest.raises(CodebookError, match="keep 6 or 8 instead"):
        Downsample().select(square, 7)
    with pytest.raises(CodebookError, match="keep 30 or 36 instead"):
        Downsample().select(square, 31)
    with pytest.raises(CodebookError, match="before the LLM"):
        Downsample().merge(tokens(6, 6), torch.arange(4))
    with pytest.raises(CodebookError, match="first stage"):
        Downsample().select(replace(square, ordinal=torch.arange(4)), 2)


def test_visionzip_by_hand():
    # [CLS] attends by the sum of a key: most to 2 and 5. Of 0 1 3 4 every second is a target: 0 and 3. By direction
    # 1 joins 0 and 4 joins 3.
    key = torch.tensor([[[0, 0], [1, 0], [1, 0.2], [3, 3], [0, 1], [0.1, 1], [2, 2]]])
    vision = Vision(torch.ones(1, 7, 2), key, 1.0, True)
    six = tokens(1, 6, torch.tensor([[10.0], [20.0], [30.0], [40.0], [60.0], [50.0]]), vision=vision)
    pruner = VisionZip(dominant=0.5)
    index = pruner.select(six, 4)
    assert index.tolist() == [0, 2, 3, 5]
    assert pruner.merge(six, index).flatten().tolist() == [15.0, 30.0, 50.0, 50.0]
    again = replace(six, vision=replace(vision, query=-vision.query))  # another forward, which ranks them otherwise
    assert pruner.merge(again, index).flatten().tolist() == [15.0, 30.0, 50.0, 50.0]
    assert VisionZip().select(six, 2).tolist() == [2, 5]  # 54/64 of 2 is 2: none is contextual
    assert VisionZip().merge(six, torch.tensor([2, 5])) is None


def directions(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_dart_by_hand():
    # L1 norms over both heads: of the image's 1 2 0 0 0 0 with 5 for token 1, of the words' 3 and 7.
    norms = torch.tensor([1.0, 5.0, 2.0, 0.5, 0.2, 0.1, 3.0, 7.0])
    key = torch.stack([-norms / 4, norms / 4])[..., None].expand(2, 8, 2)
    attention = Attention(key, key, torch.ones(8, 2), torch.zeros(8, 2), 1.0, slice(0, 6))
    six = tokens(
        1, 6, directions(0, 90, 100, 190, 270, 45), text=directions(70, 0), attention=attention, norm=Identity()
    )
    pruner = Dart(image_pivots=1, text_pivots=1)
    assert pruner.select(six, 1).tolist() == [1]
    # three more: two are the pivot's at 90 degrees, furthest 270 and 190; one is the word's at 0, furthest left is 100
    assert pruner.select(six, 4).tolist() == [1, 2, 3, 4]
    # two each: the word's are 100 and 45 degrees
    assert pruner.select(six, 5).tolist() == [1, 2, 3, 4, 5]
    # turns matter: were the word's first, it would take 190 degrees
    assert pruner.select(six, 2).tolist() == [1, 4]


def test_dart_compares_normalised_states():
    # The pivot is at 45 degrees, the others are 50 and 55 from it. With a tenth of the second axis they are at 5.7, 131
    # and -1: 125 and 7 from it.
    norms = torch.tensor([5.0, 1.0, 1.0, 1.0])
    key = norms[None, :, None].expand(2, 4, 2)
    attention = Attention(key, key, torch.ones(4, 2), torch.zeros(4, 2), 1.0, slice(0, 3))
    three = tokens(1, 3, directions(45, 95, 350), text=directions(0), attention=attention, norm=Identity())
    pruner = Dart(image_pivots=1, text_pivots=0)
    assert pruner.select(three, 2).tolist() == [0, 2]
    flat = replace(three, norm=lambda hidden: hidden * torch.tensor([1.0, 0.1]))
    assert pruner.select(flat, 2).tolist() == [0, 1]


def test_sparsevlm_scores_by_raters():
    class Rows:
        def rows(self, query):
            assert query.tolist() == [2, 3, 4]
            return torch.tensor([[0.1, 0.5], [0.9, 0.0], [0.2, 0.3]])

    # Products of the visual tokens and the words, as they enter the LLM: 3, 0, 2.1 twice. Softmax: .68, .03, .28; the
    # first is above a third. Of the words turned around only the second is.
    words = 3 * directions(0, 90, 45)
    two = tokens(1, 2, directions(0, 0), text=directions(9, 9, 9), attention=Rows(), words=words)
    two = replace(two, whole=two.features)
    assert SparseVLM().score(two).tolist() == pytest.approx([0.1, 0.5])
    turned = replace(two, words=-words)
    assert SparseVLM().score(turned).tolist() == pytest.approx([0.9, 0.0])
    assert SparseVLM().select(two, 1).tolist() == [1]


def test_sparsevlm_recycles_by_hand():
    class Ordered(SparseVLM):
        def score(self, tokens):
            return -tokens.ordinal.float()

    # Of 10 tokens 4 stay. Were 3 of them as they are, 1 + floor(0.5 * 7) = 4 would be recycled, into 1 + floor(0.25
    # * 4) = 2 averages: one too many. So 0 and 1 stay as they are, and 5 are recycled, at 0, 0.1, 1, 1.3 and 1.6.
    # The nearest of two neighbours is the token itself: densities exp(-distance^2 / 2) .995 .995 .956 .956 .956, the
    # earlier the denser, times distances to a denser one 1.6 .1 .9 .3 .3: the peaks are 2 and 4.
    line = torch.tensor([7.0, 8.0, 0.0, 0.1, 1.0, 1.3, 1.6, 60.0, 70.0, 80.0])[:, None]
    ten, pruner = tokens(2, 5, line), Ordered(recycled=0.5, clusters=0.25)
    index = pruner.select(ten, 4)
    assert index.tolist() == [0, 1, 2, 4]
    assert pruner.merge(ten, index).flatten().tolist() == pytest.approx([7.0, 8.0, 0.05, 1.3])
    # Below the least that the rule gives, 1 + 3 here, one stays as it is.
    assert Ordered(recycled=1.0, clusters=0.25).select(ten, 3)[0] == 0
    assert len(Ordered(recycled=1.0, clusters=1.0).select(ten, 9)) == 9
    assert Ordered(recycled=0.0).select(ten, 4).tolist() == [0, 1, 2, 3]
    assert Ordered(recycled=0.0).merge(ten, torch.arange(4)) is None


def test_sparsevlm_merges_into_what_it_chose_whatever_scores_have_become():
    scores = iter([-torch.arange(10.0), torch.arange(10.0)])

    class Once(SparseVLM):
        def score(self, tokens):
            return next(scores)

    line = torch.tensor([7.0, 8.0, 0.0, 0.1, 1.0, 1.3, 1.6, 60.0, 70.0, 80.0])[:, None]  # as by hand above
    ten, pruner = tokens(2, 5, line), Once(recycled=0.5, clusters=0.25)
    assert pruner.merge(ten, pruner.select(ten, 4)).flatten().tolist() == pytest.approx([7.0, 8.0, 0.05, 1.3])


def test_density_peaks_by_hand():
    # densities .51 .57 .62 .45 times distances to a denser one .1 .9 1.3 .3: .05 .51 .81 .13
    four = tokens(2, 2, torch.tensor([[0.0], [0.1], [1.0], [1.3]]))
    assert DensityPeaks().score(four).tolist() == pytest.approx([0.0509, 0.5115, 0.8085, 0.1342], abs=1e-4)
    assert DensityPeaks().select(four, 2).tolist() == [1, 2]


def test_cdpruner_by_hand():
    # cosines to the word at 0 degrees 1, .99, .8, 0 are the relevances. After the first, volume that is left of
    # r^2 - (r * cosine)^2: .98 - .96 = .02 for its near twin, .64 - .41 = .23 for the third.
    features = torch.tensor([[1.0, 0.0], [0.99, 0.141067], [0.8, 0.6], [0.0, 1.0]])
    four = tokens(
        2, 2, features * torch.tensor([[3.0], [1.0], [2.0], [1.0]]), text=torch.tensor([[2.0, 1.0], [2.0, -1.0]])
    )
    assert CDPruner().select(four, 1).tolist() == [0]
    assert CDPruner().select(four, 2).tolist() == [0, 2]
    assert CDPruner().select(four, 4).tolist() == [0, 1, 2, 3]  # beyond the rank: each once


@pytest.mark.parametrize("negated", [False, True])
def test_cdpruner_is_the_greedy_determinant(negated):
    generator = torch.Generator().manual_seed(0)
    features, text = torch.randn(30, 40, generator=generator), torch.randn(3, 40, generator=generator)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    relevance = (-1) ** negated * unit @ torch.nn.functional.normalize(text.double().mean(0), dim=0)
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    kernel, chosen = relevance[:, None] * (unit @ unit.T) * relevance, []
    for _ in range(10):
        left = [i for i in range(30) if i not in chosen]
        chosen.append(max(left, key=lambda i: torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]).item()))
    assert CDPruner(negated=negated).select(tokens(5, 6, features, text=text), 10).tolist() == sorted(chosen)


@pytest.mark.parametrize(
    "pruner", [FastV(), Alpha(), Dart(), SparseVLM(), Cls(), VisionZip(), CDPruner(), Window(FastV())], ids=repr
)
def test_projector_outputs_alone_are_not_enough(pruner):
    with pytest.raises(CodebookError, match="in a schedule, on a model"):
        pruner.select(VisualTokens.of(torch.randn(16, 4)), 4)


def test_drop_has_nothing_to_choose():
    with pytest.raises(CodebookError, match="leave its keep out"):
        Drop().select(tokens(2, 2), 2)


def test_a_fixed_pruner_does_not_choose_the_count():
    with pytest.raises(CodebookError, match="give its stage a keep"):
        Random().choose(tokens(2, 2))
