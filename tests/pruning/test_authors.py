"""The rules of the papers' code, written plainly for one image, choose what our methods choose on the same tensors."""

import pytest
import torch

from codebook.pruning import METHODS, Dart, Schedule, SparseVLM, Stage, Uniform
from codebook.pruning.presets import expand
from tests.prompts import prompt, size
from tests.pruning.made import Ranking, tokens
from tests.tiny import llava

WORDS = [[5, 6, "image", 7, 8, 9, 10, 11, 12, 13]]
FIRST = 2
"""Column of the first visual token."""


@pytest.fixture(scope="module")
def model():
    """A tiny LLaVA of eight layers whose normalisations are not all ones."""
    made = llava(layers=8)
    draw = torch.Generator().manual_seed(0)
    for norm in [made.get_decoder().norm, *(layer.input_layernorm for layer in made.get_decoder().layers)]:
        norm.weight.data = torch.rand(norm.weight.shape, generator=draw) * 3
    return made


@pytest.fixture(scope="module")
def inputs(model):
    return prompt(model, WORDS)


def inputs_of_layers(model, inputs):
    """What each layer gets when nothing is pruned, (L, d); the first are the embeddings."""
    with torch.no_grad():
        return [hidden[0] for hidden in model.model(**inputs, output_hidden_states=True).hidden_states]


def rotated(model, hidden, layer):
    """Queries and keys (heads, L, d) of one layer for hidden states (L, d) at positions 0, 1, 2, ..."""
    normed = layer.input_layernorm(hidden)
    cos, sin = (x[0] for x in model.get_decoder().rotary_emb(hidden[None], torch.arange(len(hidden))[None]))

    def heads(projection):
        x = projection(normed).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(0, 1)
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    return heads(layer.self_attn.q_proj), heads(layer.self_attn.k_proj).repeat_interleave(2, 0)


def attention(model, hidden, layer):
    """(L, L): of each token to each, averaged over heads."""
    query, key = rotated(model, hidden, layer)
    logits = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    seen = torch.ones(len(hidden), len(hidden)).tril().bool()
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).mean(0)


def kept(model, inputs, schedule):
    with torch.no_grad(), schedule(model) as pruning:
        output = model(**inputs)
    return [stage.tolist() for stage in pruning.kept[0]], output


@torch.no_grad()
@pytest.mark.parametrize("preset", ["pyramiddrop", "pyramiddrop; positions=compact"])
def test_pyramiddrop(model, inputs, preset):
    """Before layers 2, 4 and 6 the layer's own attention of the last token ranks; then positions are 0, 1, 2, ..."""
    schedule = Schedule.solve(preset, n=size(model), layers=8)
    hidden, places, chosen = inputs_of_layers(model, inputs)[0], torch.arange(size(model)), []
    for number, layer in enumerate(model.get_decoder().layers):
        if number in (2, 4, 6):
            score = attention(model, hidden, layer)[-1, FIRST : FIRST + len(places)]
            best = score.topk(size(model) // 2 ** (number // 2)).indices.sort().values
            hidden = torch.cat([hidden[:FIRST], hidden[FIRST + best], hidden[FIRST + len(places) :]])
            places = places[best]
            chosen.append(places.tolist())
        rotary = model.get_decoder().rotary_emb(hidden[None], torch.arange(len(hidden))[None])
        hidden = layer(hidden[None], position_embeddings=rotary, attention_mask=None)[0]
    ours, output = kept(model, inputs, schedule)
    assert ours == chosen and list(map(len, chosen)) == [18, 9, 4]
    expected = model.lm_head(model.get_decoder().norm(hidden[-1]))
    assert torch.allclose(output.logits[0, -1], expected, atol=1e-4)


def test_a_layer_that_is_asked_answers_as_it_would(model, inputs):
    """Not as the layer before, whose choice is another; and asking leaves no trace in what the layers give."""
    own, _ = kept(model, inputs, Schedule.parse("fastv(own_layer=True)@4:9"))
    before, _ = kept(model, inputs, Schedule.parse("fastv@4:9"))
    assert own != before
    hidden = inputs_of_layers(model, inputs)[4]
    with torch.no_grad():
        score = attention(model, hidden, model.get_decoder().layers[4])[-1, FIRST : FIRST + size(model)]
    assert own == [score.topk(9).indices.sort().values.tolist()]
    _, asked = kept(model, inputs, Schedule.parse(f"fastv(own_layer=True)@4:{size(model)}"))
    with torch.no_grad():
        assert torch.equal(asked.logits, model(**inputs).logits)


@torch.no_grad()
def test_dart(model, inputs):
    """Layer 2 of keys of layer 1: states go through the last normalisation before they are compared."""
    hidden, n = inputs_of_layers(model, inputs), size(model)
    _, key = rotated(model, hidden[1], model.get_decoder().layers[1])
    norms = key.abs().sum((0, 2))
    pivots = norms[FIRST : FIRST + n].topk(4).indices + FIRST
    words = norms[FIRST + n :].topk(4).indices + FIRST + n
    weight, state = model.get_decoder().norm.weight, hidden[2]
    normed = weight * state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    left, chosen = [i for i in range(FIRST, FIRST + n) if i not in pivots], pivots.tolist()
    for pivot in [*pivots.tolist(), *words.tolist()]:  # two each: 20 = 4 + 8 * 2
        likeness = {i: torch.cosine_similarity(normed[pivot], normed[i], dim=0).item() for i in left}
        chosen += sorted(left, key=likeness.get)[:2]
        left = [i for i in left if i not in chosen]
    ours, _ = kept(model, inputs, Schedule([Stage(2, 20, Dart())]))
    assert ours == [sorted(i - FIRST for i in chosen)]


class Seen(SparseVLM):
    """SparseVLM that shows what it merged."""

    def merge(self, tokens, index):
        values = super().merge(tokens, index)
        shown.append((tokens.hidden, index, values))
        return values


shown: list = []


@torch.no_grad()
@pytest.mark.parametrize("own", [1, 2, 5])
def test_sparsevlm(model, inputs, own):
    """What layer 2 gives is pruned by its attention: raters by embeddings, then clusters of the best of the rest."""
    n = size(model)
    hidden = inputs_of_layers(model, inputs)
    image, words = hidden[0][FIRST : FIRST + n], hidden[0][FIRST + n :]
    share = (image @ words.T).softmax(dim=1).mean(0)
    raters = [FIRST + n + i for i in range(len(words)) if share[i] > share.mean()]
    assert 0 < len(raters) < len(words)
    score = attention(model, hidden[2], model.get_decoder().layers[2])[raters, FIRST : FIRST + n].mean(0)
    top = score.topk(own).indices.tolist()
    rest = sorted(set(range(n)) - set(top), key=lambda i: -score[i])
    recycled = rest[: int(0.3 * len(rest)) + 1]
    count = int(len(recycled) / 10) + 1
    assert count == 2
    points = hidden[3][FIRST : FIRST + n][recycled]
    distance = torch.cdist(points, points) / points.shape[1] ** 0.5
    density = (-distance.topk(count, largest=False).values.square().mean(1)).exp()
    denser = density[None] > density[:, None]
    further = [
        row[more].min().item() if more.any() else distance.max().item()
        for row, more in zip(distance, denser, strict=True)
    ]
    peaks = (density * torch.tensor(further)).topk(count).indices.tolist()
    joined = [peaks.index(i) if i in peaks else int(distance[i, peaks].argmin()) for i in range(len(points))]
    members = [[i for i, own_peak in enumerate(joined) if own_peak == k] for k in range(count)]
    means = {recycled[peak]: points[group].mean(0) for peak, group in zip(peaks, members, strict=True)}
    shown.clear()
    ours, _ = kept(model, inputs, Schedule([Stage(3, own + count, Seen())]))
    assert ours == [sorted([*top, *means])]
    [(states, index, values)] = shown
    for place, value in zip(index.tolist(), values, strict=True):
        assert torch.allclose(value, means.get(place, states[place]), atol=1e-5)


@pytest.mark.parametrize("left,top,averages", [(576, 300, 9), (309, 200, 4), (204, 110, 3), (576, 66, 16), (82, 30, 2)])
def test_sparsevlm_counts(left, top, averages):
    """The authors' numbers of tokens that stay by their score, for 192 and 64 of 576, and the averages on top."""

    class Ordered(SparseVLM):
        def score(self, tokens):
            return -tokens.ordinal.float()

    features = torch.randn(left, 3, generator=torch.Generator().manual_seed(0))
    assert averages == int((int((left - top) * 0.3) + 1) / 10) + 1
    index = Ordered().select(tokens(1, left, features), top + averages)
    merged = int(0.3 * (left - top)) + 1
    assert index[:top].tolist() == list(range(top)) and index[-1] < top + merged


@pytest.mark.parametrize("n", [24, 27, 36, 48])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_the_grid_of_feather(n, stride):
    """Rows and columns 0, s, 2s, ...: 196 of 27 x 27 tokens at stride 2, 81 at stride 3."""
    grid = torch.arange(n * n).view(n, n)[::stride, ::stride].flatten()
    assert torch.equal(Uniform(phase="corner").select(tokens(n, n), len(grid)), grid)


@pytest.mark.parametrize("removed,top,size,text", [
    (0.75, 182, 243, "feather-ensemble"), (0.7, 218, 275, "feather-ensemble(share=0.2941)"),
])  # fmt: skip
def test_the_ensemble_of_feather(removed, top, size, text):
    """The union of grid and ranking, where they have as many tokens in common as chance has it: (1 - R) of the 81."""
    draw = torch.Generator().manual_seed(0)
    grid = torch.arange(729).view(27, 27)[::3, ::3].flatten()
    others = torch.tensor(sorted({*range(729)} - {*grid.tolist()}))
    grid, others = grid[torch.randperm(81, generator=draw)], others[torch.randperm(648, generator=draw)]
    common = top + 81 - size
    best = torch.cat([grid[:common], others[: top - common]])
    worst = torch.cat([grid[common:], others[top - common :]])
    scores = torch.empty(729)
    scores[best[torch.randperm(top, generator=draw)]] = torch.arange(1000.0, 1000.0 + top)
    scores[worst[torch.randperm(729 - top, generator=draw)]] = torch.arange(729.0 - top)
    [stage] = expand(f"{text}@8:{size}", 32)[0].stages
    union = METHODS[stage.method](**stage.options)
    object.__setattr__(union, "second", Ranking(*scores.tolist()))
    assert int(729 * (1 - removed) + 1e-9) == top
    assert union.select(tokens(27, 27), size).tolist() == sorted({*best.tolist(), *grid.tolist()})
    assert common == round((1 - removed) * 81)
