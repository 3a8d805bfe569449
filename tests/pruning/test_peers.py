"""The newer peers: hand-worked examples, and plain loops over their formulas on random tensors."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from codebook import Codebook
from codebook.errors import CodebookError
from codebook.pruning import (
    METHODS,
    SCOPE,
    TOPS,
    AnchorPrune,
    CDPruner,
    Cls,
    CoverPruner,
    DivPrune,
    FarthestPoint,
    Merged,
    Pruner,
    Schedule,
    SCoRe,
    SeededFarthestPoint,
    Stage,
    Union,
    VisualTokens,
    Window,
)
from codebook.pruning.attention import Attention, Vision
from codebook.pruning.methods.base import beyond_features
from tests.pruning.made import Ranking, tokens


class Tower:
    """A vision tower that attends as given."""

    def __init__(self, received):
        self._received = received

    def received(self):
        return self._received


def drawn(n=40, d=6, seed=0, **given):
    """An image of one row whose tokens share a direction, as projector outputs do, with attention and three words."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=generator) + 1.5
    text = torch.randn(3, d, generator=generator)
    received = torch.rand(n, generator=generator) ** 4
    return tokens(1, n, features, text=text, vision=Tower(received), **given)


def pairs(x):
    return cosine_similarity(x[:, None].double(), x[None].double(), dim=-1).tolist()


def scaled(values):
    low, high = min(values), max(values)
    return [(value - low) / (high - low) for value in values]


def grown(chosen, keep, n, score):
    """The set with further tokens, one after the other: each has the highest score(token, chosen before)."""
    for _ in range(keep - len(chosen)):
        scores = [-math.inf if i in chosen else score(i, chosen) for i in range(n)]
        chosen = [*chosen, scores.index(max(scores))]
    return chosen


def centred(x):
    """Similarities less the mean, and the gates, one token after the other."""
    plain, n = pairs(x), len(x)
    gate = scaled([-sum(plain[i][j] for j in range(n) if j != i) / (n - 1) for i in range(n)])
    return pairs(x.double() - x.double().mean(0)), gate


def test_the_gate_by_hand():
    # The mean is (4, 0); less it the tokens are the corners of a square. The first two are further off the mean's
    # direction, so their gates are 1 and the others' 0. From corner 0 corner 3 is the furthest, and gated it is not.
    four = tokens(2, 2, torch.tensor([[3.0, 1.0], [3.0, -1.0], [5.0, 1.0], [5.0, -1.0]]))
    assert DivPrune(centred=True).select(four, 1).tolist() == [0]
    assert DivPrune(centred=True).select(four, 2).tolist() == [0, 1]
    assert DivPrune(centred=True).select(four, 4).tolist() == [0, 1, 2, 3]
    assert METHODS["cen-divprune"]() == DivPrune(centred=True)
    assert METHODS["cen-cdpruner"]() == CDPruner(centred=True)


def test_nothing_is_kept_twice_where_all_is_alike():
    for keep in 1, 9, 16:
        for pruner in DivPrune(centred=True), FarthestPoint(centred=True):
            assert pruner.select(tokens(4, 4, torch.ones(16, 3)), keep).tolist() == list(range(keep))


def test_gated_divprune_is_the_loop():
    image = drawn()
    similarity, gate = centred(image.features)

    def score(i, chosen):
        others = chosen or [j for j in range(40) if j != i]
        return gate[i] * min(1 - similarity[i][j] for j in others)

    expected = sorted(grown([], 12, 40, score))
    assert DivPrune(centred=True).select(image, 12).tolist() == expected
    assert DivPrune().select(image, 12).tolist() != expected


def test_gated_seeds_are_the_loop():
    """Prototypes count as chosen, and are compared as they are; representatives see the centred similarities."""
    image, book = drawn(), Codebook(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))
    similarity, gate = centred(image.features)
    prior = cosine_similarity(image.features[:, None], book.prototypes[None], dim=-1).amax(1).tolist()

    def far(i, chosen):
        return gate[i] * (1 - max([prior[i], *(similarity[i][j] for j in chosen)]))

    def gain(j, chosen):
        covered = [max(similarity[i][k] for k in chosen) for i in range(40)]
        return sum(max(0, similarity[i][j] - covered[i]) for i in range(40))

    points = grown([], 10, 40, far)
    assert SeededFarthestPoint(book, 0, centred=True).select(image, 10).tolist() == sorted(points)
    expected = sorted(grown(points, 12, 40, gain))
    assert SeededFarthestPoint(book, 2, centred=True).select(image, 12).tolist() == expected


def test_gated_cdpruner_is_the_greedy_determinant():
    image = drawn(n=30, d=40)
    similarity, gate = centred(image.features)
    words = image.sequence[image.question].double().mean(0)
    relevance = scaled(cosine_similarity(image.features.double(), words[None]).tolist())
    weight = torch.tensor(relevance).double() * torch.tensor(gate).double()
    kernel = weight[:, None] * torch.tensor(similarity).double() * weight

    def volume(i, chosen):
        return torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]).item()

    assert CDPruner(centred=True).select(image, 10).tolist() == sorted(grown([], 10, 30, volume))


def at(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_the_anchor_by_hand():
    # The word points to 0 degrees, so the ranking is 0, 10, 20, 60, 70, 120, 180, 200. A cosine distance of 0.2 is 37
    # degrees. Of 8 tokens 2 are in the anchor whatever they are; 20 is not novel, 60 is, 70 is not.
    features = at(0.0, 10.0, 20.0, 60.0, 70.0, 120.0, 180.0, 200.0)
    received = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 3.0])
    image = tokens(1, 8, features, text=at(0.0), vision=Tower(received))
    pruner = AnchorPrune(least=0.5, most=1, novelties=1)
    # Two in the anchor and 20; 60 ends it. Furthest times importance is then 200, and between 70 and 120 is 120:
    # cosine distances to the anchor, or to 200, .36 and 1.17.
    assert pruner.select(image, 4).tolist() == [0, 1, 2, 7]
    assert pruner.select(image, 5).tolist() == [0, 1, 2, 5, 7]
    # A second novel one may join: 60 does, and 70 after it, until 120.
    assert replace(pruner, novelties=2).select(image, 6).tolist() == [0, 1, 2, 3, 4, 7]
    # At most half: 0, 10 and 20 of six; then 200, 120, and 70, which is 50 from both sides.
    assert replace(pruner, novelties=3, most=0.5, least=0.1).select(image, 6).tolist() == [0, 1, 2, 4, 5, 7]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [1, 2, 3, 10, 25, 40])
def test_anchorprune_is_the_loop(keep, seed):
    image = drawn(seed=seed)
    similarity, words = pairs(image.features), image.sequence[image.question].mean(0)
    relevance = cosine_similarity(image.features, words[None]).tolist()
    importance = image.vision.received().tolist()
    ranked = sorted(range(40), key=lambda i: -relevance[i])
    anchor, novel = ranked[: max(1, round(keep * 10 / 64))], 0
    for i in ranked[len(anchor) : keep // 2]:
        novel += min(1 - similarity[i][j] for j in anchor) > 0.2
        if novel == 3:
            break
        anchor.append(i)

    def score(i, chosen):
        return importance[i] * min(1 - similarity[i][j] for j in chosen)

    assert AnchorPrune().select(image, keep).tolist() == sorted(grown(anchor, keep, 40, score))


@pytest.mark.parametrize("coverage,diversity,asks", [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.0, 0), (0.5, 0.5, 1)])
def test_tops_is_the_loop(coverage, diversity, asks):
    """Before the LLM and in it: there the hidden states are compared, and the words' attention is the relevance."""
    rows = torch.rand(3, 40, generator=torch.Generator().manual_seed(5)) ** 4
    states = torch.randn(40, 6, generator=torch.Generator().manual_seed(6)) + 1
    image = drawn(attention=Asked(rows))
    if asks:
        image, method = replace(image, hidden=states), "tops-text"
        similarity, relevance = pairs(states), scaled(rows.double().mean(0).tolist())
    else:
        method, similarity, relevance = "tops", pairs(image.features), scaled(image.vision.received().tolist())

    def among(values, left):
        low, high = min(values[i] for i in left), max(values[i] for i in left)
        return {i: (values[i] - low) / (high - low) for i in left}

    chosen = [relevance.index(max(relevance))]
    while len(chosen) < 12:
        left = [i for i in range(40) if i not in chosen]
        gain = {i: sum(max(0, similarity[i][j] - max(similarity[j][k] for k in chosen)) for j in left) for i in left}
        gain = among(gain, left)
        unlike = among({i: 1 - max(similarity[i][j] for j in chosen) for i in left}, left)
        score = [relevance[i] + coverage * gain[i] + diversity * unlike[i] for i in left]
        chosen.append(left[score.index(max(score))])
    pruner = METHODS[method](coverage=coverage, diversity=diversity)
    assert pruner.select(image, 12).tolist() == sorted(chosen)
    assert (pruner.uses_attention, pruner.uses_vision) == (bool(asks), not asks)


def test_tops_by_hand():
    # 90 degrees is first. Cosines to it 0, .34, .64. Gains of 0 degrees 1 + .60 + .12 = 1.72, of 20 degrees .94 + .66 +
    # .30 = 1.90, of 40 degrees .77 + .60 + .36 = 1.72; distances 1, .66, .36. Scaled: 0, 1, .01 and 1, .47, 0.
    four = tokens(2, 2, at(90.0, 0.0, 20.0, 40.0), vision=Tower(torch.tensor([0.4, 0.1, 0.1, 0.1])))
    assert TOPS().select(four, 1).tolist() == [0]
    assert TOPS().select(four, 2).tolist() == [0, 2]
    assert TOPS(diversity=1.0).select(four, 2).tolist() == [0, 1]  # 0.5 + .47 against 1
    assert TOPS(diversity=0.0).select(four, 2).tolist() == [0, 2]
    assert TOPS().select(four, 4).tolist() == [0, 1, 2, 3]


class Asked:
    """A decoder's layer in which the words attend as given, (words, n)."""

    def __init__(self, rows):
        self._rows = rows

    def rows(self, query, **options):
        assert query.tolist() == [40, 41, 42] and options == {"rotated": True, "image_only": False}
        return self._rows


def test_coverpruner_is_the_loop():
    rows = torch.rand(3, 40, generator=torch.Generator().manual_seed(5)) ** 4
    image = drawn(attention=Asked(rows))
    similarity, demand = centred(image.features)[0], rows.double().sum(0).tolist()

    def covers(j, chosen):
        return sum(demand[i] * max(0, *(similarity[i][k] for k in [*chosen, j])) for i in range(40))

    assert CoverPruner().select(image, 12).tolist() == sorted(grown([], 12, 40, covers))
    assert str(Schedule.solve("coverpruner", keep=0.5, n=40, layers=32)).startswith("coverpruner@1:")


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_scope_is_the_loop(alpha):
    image = drawn()
    similarity, saliency = pairs(image.features), image.vision.received().tolist()

    def gain(i, chosen):
        now = [max([0, *(similarity[j][k] for k in chosen)]) for j in range(40)]
        return sum(max(0, similarity[j][i] - now[j]) for j in range(40)) * saliency[i] ** alpha

    assert SCOPE(alpha).select(image, 12).tolist() == sorted(grown([], 12, 40, gain))


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_score_is_the_loop(alpha):
    image = drawn()
    similarity, salience = pairs(image.features), image.vision.received().tolist()

    def score(i, chosen):
        return min(1 - similarity[i][j] for j in chosen) * salience[i] ** alpha if chosen else salience[i]

    assert SCoRe(alpha).select(image, 12).tolist() == sorted(grown([], 12, 40, score))


def test_what_the_tower_hears_counts_times_the_keys_length():
    # Keys of two heads behind [CLS]: 3 and 4 make 5; 0 and 1; 6 and 8 make 10. Queries are zero: all get the same.
    key = torch.tensor([[[9.0], [3.0], [0.0], [6.0]], [[9.0], [4.0], [1.0], [8.0]]])
    vision = Vision(torch.zeros_like(key), key, 1.0, has_cls=True)
    assert vision.lengths().tolist() == [5, 1, 10]
    score = Cls(keyed=True).score(tokens(1, 3, vision=vision))
    assert score.tolist() == pytest.approx([5 / 4, 1 / 4, 10 / 4])


def test_nuwa_keeps_of_each_region_of_two_by_two():
    # Keys of length 1 and equal attention but for a few: of 4 x 4 the regions are the corners. Of the first the last
    # two are heard most, and of the others the last.
    received = torch.ones(16)
    received[[4, 5, 7, 13, 15]] = torch.tensor([3.0, 4.0, 2.0, 2.0, 2.0])
    vision = Tower(received)
    vision.lengths = lambda: torch.ones(16)
    image = tokens(4, 4, vision=vision)
    assert METHODS["nuwa"]().select(image, 4).tolist() == [5, 7, 13, 15]
    assert METHODS["nuwa"]().select(image, 5).tolist() == [4, 5, 7, 13, 15]
    assert METHODS["nuwa"]().select(image, 3).tolist()[0] == 5  # fewer than regions: those that are heard most
    # A key twice as long counts twice, and regions of four tokens a side are the whole image.
    vision.lengths = lambda: torch.tensor([8.0] + [1.0] * 15)
    assert METHODS["nuwa"]().select(image, 4).tolist() == [0, 7, 13, 15]
    assert METHODS["nuwa"](region=4).select(image, 3).tolist() == [0, 4, 5]


def laplacian(grey):
    """Four neighbours less four times the pixel, those beyond the edge like it: one pixel after the other."""
    high, wide = len(grey), len(grey[0])

    def at(y, x):
        return grey[min(max(y, 0), high - 1)][min(max(x, 0), wide - 1)]

    return [
        [at(y - 1, x) + at(y + 1, x) + at(y, x - 1) + at(y, x + 1) - 4 * grey[y][x] for x in range(wide)]
        for y in range(high)
    ]


def pictured(rows, cols, pixels, moved):
    """An image's tokens behind a layer that has moved each so far."""
    image = tokens(rows, cols, torch.zeros(rows * cols, 2), pixels=pixels)
    return replace(image, hidden=torch.stack([torch.tensor(moved), torch.zeros(rows * cols)], 1))


def test_s2prune_by_hand():
    # 4 x 4 tokens of 2 x 2 pixels in 2 x 2 regions for 8 tokens, since sqrt(8 / 2) = 2. Each region has one. A pixel of
    # 1 within the second region, in an even grey, is the only structure: the other four are that region's, which has
    # room for three; what is left over goes to the first region. It is cut in the middle from top to bottom.
    grey = torch.zeros(8, 8)
    grey[1, 6] = 1.0
    moved = [1.0] * 16
    moved[4], moved[9], moved[15] = 2.0, 2.0, 2.0
    image = pictured(4, 4, grey.expand(3, 8, 8), moved)
    # 0 to 1 and 4 to 5 are the first region: upper cell and lower one, where 4 has moved furthest. All of the second is
    # kept: 2, 3, 6, 7. Of the third 9, of the fourth 15.
    assert METHODS["s2prune"]().select(image, 8).tolist() == [0, 2, 3, 4, 6, 7, 9, 15]
    # Two and three tokens: one region, cut into halves, and the lower half, as the first of equals is cut, stays whole.
    assert METHODS["s2prune"]().select(image, 2).tolist() == [4, 9]
    assert METHODS["s2prune"]().select(image, 3).tolist() == [2, 4, 9]
    # A flat picture is divided evenly: 12 of sqrt(12 / 2) = 2 x 2 regions are three of each.
    even = METHODS["s2prune"]().select(replace(image, pixels=torch.ones(3, 8, 8)), 12)
    assert [((even // 8 == r) & (even % 4 // 2 == c)).sum().item() for r in (0, 1) for c in (0, 1)] == [3] * 4
    assert METHODS["s2prune"]().select(image, 16).tolist() == list(range(16))


@pytest.mark.parametrize("keep", [8, 13, 30, 45, 61])
def test_s2prune_is_the_loop(keep):
    draw = torch.Generator().manual_seed(keep)
    pixels = torch.rand(3, 30, 36, generator=draw) * torch.rand(36, generator=draw) ** 2
    moved = torch.rand(120, generator=draw).tolist()
    grey = (0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]).tolist()
    found, parts = laplacian(grey), math.floor(math.sqrt(keep / 2))
    regions = [
        [round(a * 10 / parts), round((a + 1) * 10 / parts), round(b * 12 / parts), round((b + 1) * 12 / parts)]
        for a in range(parts)
        for b in range(parts)
    ]
    variance = []
    for top, bottom, left, right in regions:
        values = [value for row in found[3 * top : 3 * bottom] for value in row[3 * left : 3 * right]]
        mean = sum(values) / len(values)
        variance.append(sum((value - mean) ** 2 for value in values) / len(values))
    share, rest = scaled(variance) if parts > 1 else [1.0], keep - parts**2
    quota = [value / sum(share) * rest for value in share]
    counts = [1 + math.floor(value) for value in quota]
    short = sorted(range(len(quota)), key=lambda i: math.floor(quota[i]) - quota[i])[: keep - sum(counts)]
    counts = [count + (i in short) for i, count in enumerate(counts)]
    room = [(bottom - top) * (right - left) for top, bottom, left, right in regions]
    assert all(count <= most for count, most in zip(counts, room, strict=True))  # else this loop says nothing

    def halves(top, bottom, left, right):
        if bottom - top >= right - left:
            return [[top, (top + bottom) // 2, left, right], [(top + bottom) // 2, bottom, left, right]]
        return [[top, bottom, left, (left + right) // 2], [top, bottom, (left + right) // 2, right]]

    expected = []
    for region, count in zip(regions, counts, strict=True):
        cells = [region]
        while len(cells) < count:
            size = [(b - a) * (d - c) for a, b, c, d in cells]
            cells = [part for i, cell in enumerate(cells)
                     for part in (halves(*cell) if i == size.index(max(size)) else [cell])]  # fmt: skip
        for top, bottom, left, right in cells:
            own = [row * 12 + col for row in range(top, bottom) for col in range(left, right)]
            expected.append(max(own, key=lambda place: moved[place]))
    assert METHODS["s2prune"]().select(pictured(10, 12, pixels, moved), keep).tolist() == sorted(expected)


def test_s2prune_says_what_it_needs():
    image = pictured(4, 4, torch.rand(3, 8, 8), [1.0] * 16)
    pruner = METHODS["s2prune"]()
    for pixels in None, torch.rand(3, 8, 12), torch.rand(3, 6, 6):
        with pytest.raises(CodebookError, match="as one picture that the tokens' square patches cover"):
            pruner.select(replace(image, pixels=pixels), 4)
    with pytest.raises(CodebookError, match=r"not numbers \(NaN\)"):
        pruner.select(replace(image, pixels=torch.full((3, 8, 8), torch.nan)), 8)
    part = replace(image, features=image.features[:9], hidden=image.hidden[:9], ordinal=image.ordinal[:9])
    with pytest.raises(CodebookError, match="needs the whole image"):
        pruner.select(part, 4)
    with pytest.raises(CodebookError, match="S2Prune needs what a layer has made of the tokens: use it at layer 1"):
        Schedule.parse("s2prune:0.5")
    with pytest.raises(CodebookError, match="Merged needs what a layer has made of the tokens: use it at layer 1"):
        Stage(0, 4, Merged(pruner))  # nothing has moved there
    assert beyond_features(Union(pruner, Ranking(1))) == "a layer's hidden states"
    assert str(Schedule.solve("s2prune", keep=0.5, n=16, layers=32)) == "s2prune@1:7"  # (16 + 31 * 7) / 32


def test_each_window_has_its_share_of_any_method():
    # 4 x 4 in windows of 2 x 2. In each the first is unlike the other three, which are alike; of all tokens two of the
    # firsts are the least alike, and then come two of the others.
    odd = [0.0, 90.0, 90.0, 90.0]
    corner = [0, 2, 8, 10]
    features = torch.zeros(16, 3)
    for number, start in enumerate(corner):
        for angle, place in zip(odd, (start, start + 1, start + 4, start + 5), strict=True):
            features[place] = torch.cat([at(angle)[0], torch.tensor([0.1 * number])])
    image = tokens(4, 4, features)
    assert DivPrune().select(image, 4).tolist() != corner
    assert Window(DivPrune(), (2, 2)).select(image, 4).tolist() == corner
    # Sixteen windows cannot have four tokens: they are made larger, until there are as many. An uneven number goes
    # to windows at even distances.
    assert Window(DivPrune(), (4, 4)).select(image, 4).tolist() == corner
    six = Window(DivPrune(), (2, 2)).select(image, 6).tolist()
    assert set(corner) <= set(six) and {place // 8 for place in set(six) - set(corner)} == {0, 1}
    for keep in range(1, 17):
        assert len(set(Window(DivPrune(), (3, 3)).select(image, keep).tolist())) == keep


def test_windows_of_what_a_stage_left_are_as_full():
    # Nine of 4 x 4 are left, in windows of 2 x 2: the upper five, the left three of them; then four, two and two.
    left = torch.tensor([0, 1, 2, 5, 7, 8, 10, 12, 15])
    image = replace(tokens(3, 3, torch.randn(9, 4)), ordinal=left, grid=(4, 4))
    seen = []

    class First(Pruner):
        def select(self, tokens, keep):
            seen.append(tokens.ordinal.tolist())
            return torch.arange(keep)

    assert Window(First(), (2, 2)).select(image, 4).tolist() == [0, 2, 5, 6]
    assert seen == [[0, 1, 5], [2, 7], [8, 12], [10, 15]]


@pytest.mark.parametrize("made", [Window, Merged, lambda part: Union(part, Ranking(1))])
@pytest.mark.parametrize("part,does", [("evs", "EVS compares frames"), ("pool", "Pool merges tokens")])
def test_combinations_are_of_methods_that_choose_in_one_image_and_merge_nothing(made, part, does):
    with pytest.raises(CodebookError, match=rf"{does}: use it alone, in no (Window|Merged|Union)"):
        made(METHODS[part]())


def test_a_window_shows_its_part_of_the_text_and_the_attention():
    key = torch.ones(1, 10, 2)
    attention = Attention(key, key, torch.ones(10, 2), torch.zeros(10, 2), 1.0, slice(0, 8))
    image = tokens(2, 4, torch.randn(8, 4), text=torch.zeros(2, 4), attention=attention)

    class Looks(Pruner):
        def select(self, tokens, keep):
            assert torch.equal(tokens.sequence[tokens.span], tokens.hidden)
            assert len(tokens.attention.row()) == len(tokens) == 4
            return torch.arange(keep)

    assert Window(Looks(), (1, 2)).select(image, 2).tolist() == [0, 2]


@pytest.mark.parametrize(
    "pruner", [AnchorPrune(), TOPS(), CoverPruner(), SCOPE(), SCoRe(), METHODS["nuwa"]()], ids=repr
)
def test_projector_outputs_alone_are_not_enough(pruner):
    with pytest.raises(CodebookError, match="in a schedule, on a model"):
        pruner.select(VisualTokens.of(torch.randn(16, 4)), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["anchorprune", "cen-cdpruner", "cen-divprune", "divprune-window", "scope", "score", "tops"]
)
def test_half_precision_is_computed_in_float32(name, dtype):
    image = drawn()
    half = replace(image, features=image.features.to(dtype), hidden=image.hidden.to(dtype),
                   sequence=image.sequence.to(dtype))  # fmt: skip
    same = replace(half, features=half.features.float(), hidden=half.hidden.float(), sequence=half.sequence.float())
    assert torch.equal(METHODS[name]().select(half, 11), METHODS[name]().select(same, 11))
