"""Attention rows without attention maps equal the stock eager maps."""

import pytest
import torch

from codebook import models
from codebook.errors import CodebookError
from codebook.pruning import Cls, FastV, Random, Schedule, Stage
from codebook.pruning.attention import Attention, Vision
from tests.prompts import RAGGED, prompt, size
from tests.tiny import llava

LAYER = 2


class Spy(FastV):
    """FastV that remembers the scores it gave."""

    def score(self, tokens):
        self.seen.append(super().score(tokens))
        return self.seen[-1]


def scores(model, inputs, before=(), **options):
    spy = Spy(**options)
    object.__setattr__(spy, "seen", [])
    with torch.no_grad(), Schedule([*before, Stage(LAYER, 3, spy)])(model) as pruning:
        model(**inputs)
    return spy.seen, pruning.kept


def images(model, inputs):
    """Row and columns of each image."""
    for row, ids in enumerate(inputs["input_ids"]):
        columns = (ids == model.config.image_token_id).nonzero().flatten()
        yield from ((row, part) for part in columns.split(size(model)))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pad_left", [True, False])
def test_rows_equal_output_attentions(attention, pad_left):
    model, eager = llava(attention), llava("eager")
    inputs = prompt(model, RAGGED, pad_left)
    maps = eager(**inputs, output_attentions=True).attentions[LAYER - 1].mean(1)
    last = [int(mask.nonzero().max()) for mask in inputs["attention_mask"]]
    for query in ("text", "visual"):
        ours, _ = scores(model, inputs, query=query)
        for score, (row, columns) in zip(ours, images(model, inputs), strict=True):
            at = last[row] if query == "text" else columns[-1]
            assert torch.allclose(score, maps[row, at, columns], atol=1e-6)
    ours, _ = scores(model, inputs, query="question")
    for score, (row, columns) in zip(ours, images(model, inputs), strict=True):
        # Text before an image sees nothing of it, and other images are no text.
        text = inputs["attention_mask"][row].bool() & (inputs["input_ids"][row] != model.config.image_token_id)
        assert torch.allclose(score, maps[row][text][:, columns].sum(0), atol=1e-6)


@torch.no_grad()
def test_rows_after_an_earlier_stage_equal_the_masked_map():
    """Layer 1 sees 12 tokens an image: its attention is the full one with the dropped columns masked."""
    model = llava()
    inputs = prompt(model, RAGGED)
    ours, kept = scores(model, inputs, before=[Stage(1, 12, Random())])
    embeds = model.model(**inputs, output_hidden_states=True).hidden_states
    layer = model.get_decoder().layers[1]
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, : embeds[1].shape[1]]
    # positions of a plain forward are columns: stock LLaVA numbers padded rows from the first column
    cos, sin = model.get_decoder().rotary_emb(embeds[1], torch.arange(positions.shape[1])[None])
    normed = layer.input_layernorm(embeds[1])

    def heads(projection, count):
        x = projection(normed).unflatten(-1, (count, -1)).transpose(1, 2)
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

    query, key = heads(layer.self_attn.q_proj, 4), heads(layer.self_attn.k_proj, 2).repeat_interleave(2, 1)
    logits = (query[:, :, -1:] @ key.transpose(2, 3))[:, :, 0] * layer.self_attn.scaling
    seen = inputs["attention_mask"].bool()
    for (row, columns), stages in zip(images(model, inputs), kept, strict=True):
        gone = torch.ones(len(columns), dtype=torch.bool)
        gone[stages[0]] = False
        seen[row, columns[gone]] = False
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).mean(1)
    for score, stages, (row, columns) in zip(ours, kept, images(model, inputs), strict=True):
        assert torch.allclose(score, weights[row, columns[stages[0]]], atol=1e-6)


@torch.no_grad()
def test_tokens_that_stand_for_several_get_more_attention():
    """Rows equal the stock maps of the layer as it ran, with the bias in them."""
    model = llava("eager")
    inputs, rows = prompt(model, RAGGED), {}
    for mass in (True, False):
        spy, first = Spy(), Stage(1, 12, Random(), mass)
        object.__setattr__(spy, "seen", [])
        with Schedule([first, Stage(LAYER, 3, spy)])(model):
            maps = model(**inputs, output_attentions=True).attentions[LAYER - 1].mean(1)
        lengths = inputs["attention_mask"].sum(1)
        rows[mass] = spy.seen
        scores = iter(spy.seen)
        for ids, length, last in zip(inputs["input_ids"], lengths, maps[:, -1], strict=True):
            visual, shorter = (ids == model.config.image_token_id)[-length:], []
            for columns in visual.nonzero().flatten().split(size(model)):
                shorter.append((int(columns[0]) - 24 * len(shorter), next(scores)))
            left = len(last) - (int(length) - 24 * len(shorter))
            for start, score in shorter:
                assert torch.allclose(score, last[left + start : left + start + 12], atol=1e-6)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(rows[True], rows[False], strict=True))


@torch.no_grad()
def test_unrotated_rows_are_plain_projections():
    model = llava()
    inputs = prompt(model, [[5, "image", 7, 8]])
    ours, _ = scores(model, inputs, rotated=False, image_only=True)
    hidden = model.model(**inputs, output_hidden_states=True).hidden_states[LAYER - 1]
    layer = model.get_decoder().layers[LAYER - 1]
    normed = layer.input_layernorm(hidden)[0]
    query = layer.self_attn.q_proj(normed).unflatten(-1, (4, -1))[-1]
    key = layer.self_attn.k_proj(normed).unflatten(-1, (2, -1)).repeat_interleave(2, 1)[1 : 1 + size(model)]
    weights = (torch.einsum("hd,nhd->hn", query, key) * layer.self_attn.scaling).softmax(-1).mean(0)
    assert torch.allclose(ours[0], weights, atol=1e-6)


@torch.no_grad()
def test_rows_of_several_queries_equal_output_attentions(monkeypatch):
    monkeypatch.setattr("codebook.pruning.attention.QUERIES", 2)  # three and one at once

    class Question(Random):
        uses_attention = True

        def score(self, tokens):
            seen.append((tokens.question, tokens.attention.rows(tokens.question)))
            return super().score(tokens)

    seen, model = [], llava()
    inputs = prompt(model, [[5, "image", 7, "image", 8, 9]])
    maps = llava("eager")(**inputs, output_attentions=True).attentions[LAYER - 1].mean(1)[0]
    with Schedule([Stage(LAYER, 3, Question())])(model):
        model(**inputs)
    n = size(model)
    for (places, rows), first, text in zip(seen, (1, 2 + n), ([1 + n, 2 + 2 * n, 3 + 2 * n],) * 2, strict=True):
        assert places.tolist() == [place for place in text if place > first]
        assert torch.allclose(rows, maps[places, first : first + n], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_tower_attention_equals_output_attentions(tower, attention, monkeypatch):
    class Look(Cls):
        def score(self, tokens):
            seen.append(tokens.vision)
            return super().score(tokens)

    monkeypatch.setattr("codebook.pruning.attention.QUERIES", 7)
    seen, model, eager = [], llava(attention, tower=tower), llava("eager", tower=tower)
    inputs = prompt(model, RAGGED)
    maps = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-2].mean(1)
    with Schedule([Stage(0, 3, Look())])(model):
        model(**inputs)
        for beams in (1, 2):  # each row once more, after the encoding
            model.generate(**inputs, max_new_tokens=1, num_beams=beams, do_sample=False)
    assert len(seen) == 5 + 5 + 10
    places = [*range(5), *range(5), 0, 0, 1, 2, 1, 2, 3, 4, 3, 4]
    for vision, i in zip(seen, places, strict=True):
        expected = maps[i, 0, 1:] if tower == "clip" else maps[i].mean(0)
        assert torch.allclose(vision.received(), expected, atol=1e-6)
        layer = model.model.vision_tower.encoder.layers[1].self_attn
        assert vision.descriptors().shape == (size(model), layer.head_dim)


def test_the_tapped_layer_is_the_one_that_feeds_the_projector():
    model = llava()
    layers, family = model.model.vision_tower.encoder.layers, models.family(model)
    for setting, layer in ((-1, 2), (-2, 1), (2, 1), (3, 2), ([-3, -2], 1)):
        model.config.vision_feature_layer = setting
        assert family.vision_attention(model) is layers[layer].self_attn
    model.config.vision_feature_layer = 0
    with pytest.raises(CodebookError, match="no attention before"):
        family.vision_attention(model)


def test_products_that_float16_does_not_hold():
    """Scaled they are less than 30,000, unscaled more than 200,000; heads share keys."""
    generator = torch.Generator().manual_seed(0)
    query, key = (20 * torch.randn(heads, 10, 64, generator=generator) for heads in (4, 2))
    query[:, -1] *= 8
    key[:, 3] *= 4
    query, key = query.half(), key.half()
    logits = query.double() @ key.double().repeat_interleave(2, 0).mT / 8
    assert 2.5e4 < logits.abs().max() < 3e4
    ours = Attention(query, key, torch.ones(10, 64), torch.zeros(10, 64), 64**-0.5, slice(0, 6)).row()
    assert torch.allclose(ours.double(), logits[:, -1].softmax(-1)[:, :6].mean(0), atol=1e-3)
    tower = Vision(query, key, 64**-0.5, has_cls=False).received()
    assert torch.allclose(tower.double(), logits.softmax(-1).mean((0, 1)), atol=1e-3)


def test_reverse_keeps_the_other_end():
    model = llava()
    inputs = prompt(model, [[5, "image", 7, 8]])
    seen, kept = scores(model, inputs)
    assert kept[0][0].tolist() == seen[0].topk(3).indices.sort().values.tolist()
    _, kept = scores(model, inputs, reverse=True)
    assert kept[0][0].tolist() == (-seen[0]).topk(3).indices.sort().values.tolist()


def test_attention_is_not_known_before_the_llm():
    with pytest.raises(CodebookError, match="layer 1 or later"):
        Stage(0, 0.5, FastV())


def test_leaving_restores_the_attention_modules():
    model = llava()
    modules = [layer.self_attn for layer in model.get_decoder().layers]
    before = [(m.config, sorted(m.__dict__)) for m in modules]
    tower = model.model.vision_tower.encoder.layers[1].self_attn
    own = tower.config, sorted(tower.__dict__)
    with Schedule([Stage(0, 9, Cls()), Stage(2, 3, FastV())])(model):
        assert tower.config is not own[0]
        assert [m.config is b[0] for m, b in zip(modules, before, strict=True)] == [True, False, True, True]
    assert all(
        m.config is c and sorted(m.__dict__) == d for m, (c, d) in zip([*modules, tower], [*before, own], strict=True)
    )
