"""Pruning through hooks and a shorter cache equals masking in a full forward without a cache."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import StaticCache

from codebook import load
from codebook.errors import CodebookError
from codebook.pruning import (
    Downsample,
    Drop,
    FastV,
    Pool,
    Random,
    RedundancyThreshold,
    Schedule,
    Stage,
    Uniform,
    VisionZip,
)
from codebook.pruning.engine.forward import Forward
from codebook.store.codebook import Codebook
from tests import reference
from tests.prompts import ONE, RAGGED, assert_close, gone_from, mass, prompt, size
from tests.tiny import llava

STEPS = 20
SCHEDULES = {
    "pre": Schedule([Stage(0, 0.3, Random())]),
    "layer 2": Schedule([Stage(2, 10, Random())]),
    "layers 1+3": Schedule([Stage(1, 0.5, Random()), Stage(3, 3, Uniform())]),
    "attention at 2": Schedule([Stage(0, 0.5, Random()), Stage(2, 4, FastV())]),
    "drop at 2": Schedule([Stage(0, 0.5, Random()), Stage(2, 0, Drop())]),
    "mass": Schedule([Stage(0, 0.3, Random(), mass=True), Stage(1, 0.2, Random()), Stage(3, 3, FastV(), mass=True)]),
    "pre+1+2": Schedule([Stage(0, 0.5, Uniform()), Stage(1, 0.25, Random()), Stage(2, 1, Random(3))]),
}

BATCHES = {"one": ONE, "ragged, several images": RAGGED}


@pytest.fixture(scope="module", params=["tiny, sdpa", "tiny, eager", "miniature, sdpa", "miniature, eager"])
def model(request):
    name, attention = request.param.split(", ")
    if name == "tiny":
        return llava(attention)
    model, processor = load("miniature", "cpu")
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = None  # never stops early
    return model


@pytest.fixture
def one(model):
    return prompt(model, ONE)


@pytest.fixture
def ragged(model):
    return prompt(model, RAGGED)


@torch.no_grad()
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_generate_equals_masked_reference(model, name, batch):
    inputs, schedule = prompt(model, BATCHES[batch]), SCHEDULES[name]
    with schedule(model) as pruning:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    gone = gone_from(inputs, pruning, schedule)
    assert (gone < 100).any()
    said = out.sequences[:, inputs["input_ids"].shape[1] :]
    given = model, inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], gone, said
    tokens, logits = reference.generate(*given, mass=mass(inputs, pruning, schedule))
    assert torch.equal(said, tokens)
    assert_close(torch.stack(out.logits, 1), logits)
    physical = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    counts = schedule.counts(size(model), len(physical))
    images = [(row == model.config.image_token_id).sum().item() // size(model) for row in inputs["input_ids"]]
    text = [int(m.sum()) - size(model) * k for m, k in zip(inputs["attention_mask"], images, strict=True)]
    for layer, count in enumerate(counts):
        expected = max(t + k * count for t, k in zip(text, images, strict=True)) + STEPS - 1
        if count == size(model):
            expected = inputs["input_ids"].shape[1] + STEPS - 1
        assert physical[layer] == expected


def edited(inputs, pruning, layer, values):
    """For the reference: at `layer`, `values(hidden (n, d), kept)` in place of each image's kept hidden states."""
    image_id, n = pruning.model.config.image_token_id, size(pruning.model)
    kept = [stages[0] for stages in pruning.kept]

    def edit(i, hidden):
        if i != layer:
            return hidden
        hidden, images = hidden.clone(), iter(kept)
        for row, ids in enumerate(inputs["input_ids"]):
            for columns in (ids == image_id).nonzero().flatten().split(n):
                index = next(images)
                hidden[row, columns[index]] = values(hidden[row, columns], index)
        return hidden

    return edit


def compare(model, inputs, schedule, layer, values):
    """Generated tokens and logits against the reference in which the first stage, at `layer`, merges to `values`."""
    with schedule(model) as pruning:
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    gone, edit = gone_from(inputs, pruning, schedule), edited(inputs, pruning, layer, values)
    said = out.sequences[:, inputs["input_ids"].shape[1] :]
    given = model, inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], gone, said
    weight = mass(inputs, pruning, schedule)
    tokens, logits = reference.generate(*given, edit=edit, mass=weight)
    assert torch.equal(said, tokens)
    assert_close(torch.stack(out.logits, 1), logits)
    assert (logits - reference.generate(*given, mass=weight)[1]).abs().max() > 1e-3 * logits.abs().max()  # it matters


def positions(inputs):
    """Of padded rows, as `generate` makes them."""
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


def averages(hidden, kept):
    """2 x 2 averages, in the order of the kept tokens, which is the cells'."""
    side, cells = int(len(hidden) ** 0.5), len(kept)
    return torch.nn.functional.avg_pool2d(hidden.T.view(-1, side, side), 2).view(-1, cells).T


@torch.no_grad()
def test_a_stage_skips_images_that_have_nothing_left(model, ragged):
    dropped, late = Schedule([Stage(2, 0, Drop())]), Schedule([Stage(3, 4, FastV())])
    with dropped(model):
        expected = model(**ragged).logits
    object.__setattr__(late, "stages", dropped.stages + late.stages)  # a schedule refuses this: it is pointless
    with late(model) as pruning:
        assert torch.equal(model(**ragged).logits, expected)
    assert all(not len(index) for stages in pruning.kept for index in stages)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2])
def test_generate_with_pooled_values_equals_the_edited_reference(model, ragged, layer):
    schedule = Schedule([Stage(layer, 0.25, Pool(), mass=layer > 0), Stage(3, 2, Random())])
    compare(model, ragged, schedule, layer, averages)


@torch.no_grad()
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_generate_on_a_downsampled_image_equals_the_edited_reference(tower):
    model = llava(tower=tower)
    inputs = prompt(model, [["image", 7, 8, 9]])
    small = torch.nn.functional.interpolate(inputs["pixel_values"], (12, 16), mode="bicubic", antialias=True)
    features = model.get_image_features(pixel_values=small, interpolate_pos_encoding=True, return_dict=True)
    schedule = Schedule([Stage(0, 12, Downsample())])
    compare(model, inputs, schedule, 0, lambda hidden, kept: features.pooler_output[0])


@torch.no_grad()
def test_images_encoded_beforehand():
    """Inside the context their pixels and attention are known, also after a stage encoded one anew; outside not."""
    model, plan = llava(), Schedule([Stage(0, 12, Downsample())])
    inputs = prompt(model, [["image", 7, 8, 9]])
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    with plan(model):
        expected = model(**inputs).logits
        encoded = {"image": model.get_image_features(pixel_values=pixels, return_dict=True)}
        for _ in range(2):
            assert torch.equal(model(input_ids=ids, mm_encoder_outputs=encoded).logits, expected)
    for schedule, what in ((plan, "pixels"), (Schedule([Stage(0, 12, VisionZip())]), "vision tower")):
        with schedule(model), pytest.raises(CodebookError, match=what):
            model(input_ids=ids, mm_encoder_outputs=encoded)


@torch.no_grad()
def test_later_stages_see_what_was_merged(model, one):
    """Features of a stage after pooling are the pooled ones."""

    class Look(Random):
        def score(self, tokens):
            seen.append((tokens.features, tokens.hidden))
            return super().score(tokens)

    seen = []
    with Schedule([Stage(0, 0.25, Pool()), Stage(1, 2, Look())])(model) as pruning:
        model(**one)
    columns = (one["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    embeds = reference.merged(model, one["input_ids"], one["pixel_values"])[0, columns]
    assert torch.allclose(seen[0][0], averages(embeds, pruning.kept[0][0]), atol=1e-6)
    assert seen[0][0].shape == seen[0][1].shape


@torch.no_grad()
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_generate_with_counts_the_method_chooses(model, ragged, positions):
    """As many tokens of each image as are unlike some of the first image's."""
    features = model.get_image_features(pixel_values=ragged["pixel_values"], return_dict=True).pooler_output
    book = Codebook(features[0][::9].contiguous())
    scores = book.redundancy(torch.cat(list(features))).sort().values
    threshold = float(scores[len(scores) // 2 - 1 : len(scores) // 2 + 1].mean())
    pruner = RedundancyThreshold(book, threshold=threshold)
    schedule = Schedule([Stage(0, None, pruner), Stage(2, 1, Random())], positions=positions)
    with schedule(model) as pruning:
        out = model.generate(
            **ragged, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    counts = {len(stages[0]) for stages in pruning.kept}
    assert len(counts) > 2 and min(counts) >= 1  # a ragged batch indeed
    if positions == "keep":
        given = model, ragged["input_ids"], ragged["pixel_values"], ragged["attention_mask"]
        said = out.sequences[:, ragged["input_ids"].shape[1] :]
        tokens, logits = reference.generate(*given, gone_from(ragged, pruning, schedule), said)
        assert torch.equal(said, tokens)
        assert_close(torch.stack(out.logits, 1), logits)


@torch.no_grad()
def test_difference_from_unpruned_is_large(model, one):
    """The control: without it the tolerances above would prove nothing."""
    with SCHEDULES["pre"](model):
        pruned = model(**one).logits[:, -1]
    assert (pruned - model(**one).logits[:, -1]).abs().max() > 0.1
    with Schedule([Stage(0, 0.3, Random(), mass=True)])(model):
        assert (pruned - model(**one).logits[:, -1]).abs().max() > 0.1


@torch.no_grad()
def test_keeping_everything_is_the_untouched_model_bit_for_bit(model, one, ragged):
    schedule = Schedule([Stage(0, 1.0, Random(), mass=True), Stage(2, size(model), Uniform())])
    for inputs in (one, ragged):
        plain = model(**inputs).logits
        text = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        with schedule(model):
            assert torch.equal(model(**inputs).logits, plain)
            assert torch.equal(model.generate(**inputs, max_new_tokens=STEPS, do_sample=False), text)


@torch.no_grad()
def test_before_the_llm_equals_tokens_removed_by_hand_bit_for_bit(model, one):
    with SCHEDULES["pre"](model) as pruning:
        pruned = model(**one).logits
    columns = (one["input_ids"][0] == model.config.image_token_id).nonzero().flatten()[pruning.kept[0][0]]
    left = torch.cat([(one["input_ids"][0] != model.config.image_token_id).nonzero().flatten(), columns]).sort().values
    embeds = reference.merged(model, one["input_ids"], one["pixel_values"])[:, left]
    by_hand = model(
        inputs_embeds=embeds,
        position_ids=left[None],
        attention_mask=torch.ones(1, len(left), dtype=torch.long),
    ).logits
    assert torch.equal(pruned[:, left], by_hand)
    # only the lm_head sees dropped places, and it sees what the last token left before each has
    for column in sorted({*range(one["input_ids"].shape[1])} - {*left.tolist()}):
        assert torch.equal(pruned[:, column], by_hand[:, (left < column).sum() - 1])


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 9])
def test_the_loss_is_that_of_the_tokens_that_are_left(model, ragged, keep):
    """Also of the word after an image, which a dropped token would predict."""
    schedule, text = Schedule([Stage(0, keep, Random())]), ragged["input_ids"] != model.config.image_token_id
    first = ragged["attention_mask"].cumsum(1) < 2  # and padding before it: nothing predicts it
    labels = ragged["input_ids"].masked_fill(first | ~text, -100)
    with schedule(model) as pruning:
        loss = model(**ragged, labels=labels, position_ids=positions(ragged)).loss
    stays = (gone_from(ragged, pruning, schedule) > 0) & ragged["attention_mask"].bool()
    embeds, terms = reference.merged(model, ragged["input_ids"], ragged["pixel_values"]), []
    for row, own in enumerate(stays):
        given = {"inputs_embeds": embeds[row, own][None], "position_ids": positions(ragged)[row, own][None]}
        answers, wanted = model(**given).logits[0, :-1], labels[row, own][1:]
        terms.append(torch.nn.functional.cross_entropy(answers, wanted, reduction="none")[wanted >= 0])
    torch.testing.assert_close(loss, torch.cat(terms).mean(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_compact_positions_equal_a_genuinely_short_prompt(model, one):
    schedule = Schedule(SCHEDULES["pre"].stages, positions="compact")
    with schedule(model) as pruning:
        out = model.generate(**one, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    columns = (one["input_ids"][0] == model.config.image_token_id).nonzero().flatten()[pruning.kept[0][0]]
    left = torch.cat([(one["input_ids"][0] != model.config.image_token_id).nonzero().flatten(), columns]).sort().values
    embeds = reference.merged(model, one["input_ids"], one["pixel_values"])[:, left]
    short = model.generate(
        inputs_embeds=embeds,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(out.sequences[:, one["input_ids"].shape[1] :], short.sequences)
    for ours, theirs in zip(out.logits, short.logits, strict=True):
        assert_close(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("keep", [5, 0])
def test_compact_positions_in_deep_stages_and_ragged_batches(model, ragged, keep):
    """From layer 2 on, keys are rotated by their rank among the survivors."""
    schedule = Schedule([Stage(0, 0.5, Random()), Stage(2, keep, Random())], positions="compact")
    with schedule(model) as pruning:
        ours = model(**ragged).logits[:, -1]
    gone, lm = gone_from(ragged, pruning, schedule), model.get_decoder()
    hidden = reference.merged(model, ragged["input_ids"], ragged["pixel_values"])
    for row in range(len(gone)):
        h, columns = hidden[row : row + 1], torch.arange(gone.shape[1])
        columns = columns[ragged["attention_mask"][row].bool()]
        h = h[:, columns]
        for i, layer in enumerate(lm.layers):
            stays = gone[row, columns] > i
            h, columns = h[:, stays], columns[stays]
            rotary = lm.rotary_emb(h, torch.arange(len(columns))[None])
            n = len(columns)
            mask = torch.zeros(n, n).masked_fill(torch.ones(n, n).triu(1).bool(), torch.finfo(h.dtype).min)
            h = layer(h, attention_mask=mask[None, None], position_embeddings=rotary)
        # the batch's positions start at the padding; only their differences matter
        assert_close(model.lm_head(lm.norm(h))[0, -1], ours[row])


@torch.no_grad()
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_a_row_is_the_same_alone_and_in_a_batch(model, positions):
    rows = [["image", 7, 8, 9, 10], [5, 6, 11, "image", 12, "image", 13]]
    both = prompt(model, rows)
    schedule = Schedule([Stage(0, 0.5, Random()), Stage(2, 4, Random())], positions=positions)
    with schedule(model) as pruning:
        together = model.generate(
            **both, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        kept, first = pruning.kept, 0
        for row, parts in enumerate(rows):
            images = parts.count("image")
            alone = prompt(model, [parts]) | {"pixel_values": both["pixel_values"][first : first + images]}
            out = model.generate(
                **alone, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            for ours, theirs in zip(pruning.kept, kept[first : first + images], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert_close(out.logits[0][0], together.logits[0][row])
            first += images


@torch.no_grad()
def test_what_tokens_stand_for_adds_up(model, ragged, monkeypatch):
    """The kept tokens of an image stand for all of it, stage after stage, but for what a stage without mass forgets."""
    seen, prune = [], Forward.prune

    def watched(self, stage, hidden):
        hidden = prune(self, stage, hidden)
        seen.append([int(unit.mass.sum()) for unit in self.units])
        return hidden

    monkeypatch.setattr(Forward, "prune", watched)
    with Schedule([Stage(0, 0.5, Random(), mass=True), Stage(1, 5, Random(), mass=True), Stage(2, 2, Random())])(model):
        model(**ragged)
    assert seen[:2] == [[size(model)] * 5] * 2
    assert all(2 <= total < size(model) for total in seen[2])


@torch.no_grad()
def test_right_padding_and_loss(model):
    left, right = (
        prompt(model, [["image", 7, 8, 9], [5, "image", 6]]),
        prompt(model, [["image", 7, 8, 9], [5, "image", 6]], False),
    )
    with SCHEDULES["pre+1+2"](model):
        a = model(**left).logits[:, -1]
        out = model(**right, labels=right["input_ids"])
    last = right["attention_mask"].sum(1) - 1
    assert_close(out.logits[torch.arange(2), last], a)
    assert out.logits.shape[1] == right["input_ids"].shape[1] and out.loss.isfinite()


@torch.no_grad()
def test_kept_sets_do_not_depend_on_attention_implementation():
    kept = []
    for attention in ("sdpa", "eager"):
        with SCHEDULES["layers 1+3"](model := llava(attention)) as pruning:
            model(**prompt(model, RAGGED))
        kept.append(pruning.kept)
    assert all(torch.equal(x, y) for a, b in zip(*kept, strict=True) for x, y in zip(a, b, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_cache_continuation_and_manual_loops(model, positions, one):
    """A second turn on a pruned cache, fed several tokens at once, equals one token at a time."""
    schedule = Schedule([Stage(0, 0.5, Random()), Stage(2, 4, Random())], positions=positions)
    turn = torch.tensor([[21, 22, 23, 24]])
    with schedule(model):
        first = model(**one, use_cache=True)
        snapshot = copy.deepcopy(first.past_key_values)
        at_once = model(input_ids=turn, past_key_values=first.past_key_values).logits
        steps = [model(input_ids=turn[:, i : i + 1], past_key_values=snapshot).logits for i in range(4)]
    assert_close(at_once, torch.cat(steps, 1))
    with pytest.raises(CodebookError, match="inside"):
        model(input_ids=turn, past_key_values=first.past_key_values)


@torch.no_grad()
@pytest.mark.parametrize("name", ["layers 1+3", "mass"])
def test_continuation_equals_masked_reference(model, one, name):
    schedule, turn = SCHEDULES[name], torch.tensor([[21, 22, 23]])
    with schedule(model) as pruning:
        cache = model(**one, use_cache=True).past_key_values
        ours = model(input_ids=turn, past_key_values=cache).logits[:, -1]
    gone = torch.cat([gone_from(one, pruning, schedule), torch.full_like(turn, 10**6)], 1)
    embeds = reference.merged(model, torch.cat([one["input_ids"], turn], 1), one["pixel_values"])
    theirs = reference.logits(model, embeds, torch.ones_like(gone), gone, mass=mass(one, pruning, schedule))
    assert_close(ours, theirs)


@torch.no_grad()
def test_a_second_question_generated_on_the_pruned_cache(model, one):
    schedule, turn = SCHEDULES["pre+1+2"], torch.tensor([[21, 22, 23]])
    with schedule(model) as pruning:
        first = model.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, turn], 1)
        second = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values,
            max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    gone = torch.full_like(ids, 10**6)
    gone[:, : one["input_ids"].shape[1]] = gone_from(one, pruning, schedule)
    # generated image tokens are text: their embeddings are the word's
    embeds = model.get_input_embeddings()(ids)
    embeds[:, : one["input_ids"].shape[1]] = reference.merged(model, one["input_ids"], one["pixel_values"])
    for step in range(6):
        logits = reference.logits(model, embeds, torch.ones_like(gone), gone)
        assert_close(second.logits[step], logits)
        token = logits.argmax(-1, keepdim=True)
        assert second.sequences[0, ids.shape[1] + step] == token
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)], 1)
        gone = torch.cat([gone, torch.full((1, 1), 10**6)], 1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pre+1+2", "mass"])
def test_a_second_image_in_a_second_turn(model, name):
    """It is pruned on top of a cache that is pruned already."""
    schedule, turns = SCHEDULES[name], [prompt(model, [[5, "image", 7]]), prompt(model, [[8, "image", 9, 11]])]
    turns[1]["pixel_values"] = turns[1]["pixel_values"].flip(-1)
    with schedule(model) as pruning:
        cache = model(**turns[0], use_cache=True).past_key_values
        gone, first = [gone_from(turns[0], pruning, schedule)], mass(turns[0], pruning, schedule)
        whole = torch.ones(1, sum(turn["input_ids"].shape[1] for turn in turns), dtype=torch.long)
        ours = model(**turns[1] | {"attention_mask": whole}, past_key_values=cache).logits[:, -1]
        gone.append(gone_from(turns[1], pruning, schedule))
    ids, pixels = (
        torch.cat([turn[name] for turn in turns], axis) for name, axis in (("input_ids", 1), ("pixel_values", 0))
    )
    if weight := mass(turns[1], pruning, schedule):
        length = gone[0].shape[1]
        weight.units = [*first.units, *((row, columns + length, kept) for row, columns, kept in weight.units)]
    embeds = reference.merged(model, ids, pixels)
    theirs = reference.logits(model, embeds, whole, torch.cat(gone, 1), mass=weight)
    assert_close(ours, theirs)


@torch.no_grad()
def test_layers_of_one_stage_share_an_index_whatever_is_done_to_the_cache(model, ragged):
    """Whoever shares an index shares a mask: layers are told one by one to take other rows, or fewer columns."""
    with Schedule([Stage(0, 0.3, Random(), mass=True)])(model):
        cache = model(**ragged).past_key_values
        whole = torch.cat([ragged["attention_mask"], torch.ones(3, 6, dtype=torch.long)], 1)
        model(input_ids=torch.full((3, 6), 31), attention_mask=whole, past_key_values=cache)  # to be cropped off
        columns, bias = cache.layers[0].index.columns, cache.layers[0].index.bias
        rows = torch.tensor([2, 0, 1])
        for _ in range(2):  # the second time another index is to be made by the same tensor and number
            cache.reorder_cache(rows)
            cache.batch_repeat_interleave(2)
            cache.crop(-2)
            cache.batch_select_indices(torch.tensor([1, 2, 4]))
            columns, bias = columns[rows][:, :-2], bias[rows][:, :-2]
            assert len({id(layer.index) for layer in cache.layers}) == 1
            index = cache.layers[-1].index
            assert torch.equal(index.columns, columns) and torch.equal(index.bias, bias)
        one, other = index.rows(rows), index.rows(torch.tensor([1, 1, 0]))
        assert torch.equal(one.columns, columns[rows]) and torch.equal(other.columns, columns[[1, 1, 0]])
        assert index.cropped(2).columns.shape[1] == index.cropped(1).columns.shape[1] - 1


@torch.no_grad()
def test_a_cache_is_cropped_down_to_its_pruned_images_and_no_further(model, one):
    """What is cropped off of a layer that stores fewer tokens must be the same ones; what was last of a row is."""
    after = len(ONE[0]) - 1 - ONE[0].index("image")
    with Schedule([Stage(1, 0.3, Random(), mass=True)])(model):
        cache = model(**one).past_key_values
        cache.crop(-after)
        again = model(input_ids=one["input_ids"][:, -after:], past_key_values=cache)
        assert_close(again.logits, model(**one).logits[:, -after:])
        for count in after + 1, 20, 30:
            with pytest.raises(CodebookError, match=f"last {count} tokens, to be cropped off, reach back"):
                model(**one).past_key_values.crop(-count)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_counted_does_not_depend_on_the_default_dtype(model, ragged, dtype):
    with Schedule([Stage(0, 0.3, Random(), "distance"), Stage(2, 3, Random(), mass=True)])(model):
        expected = model(**ragged).logits
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(model(**ragged).logits, expected)
        finally:
            torch.set_default_dtype(before)


@torch.no_grad()
def test_beams_and_repeats_agree_with_the_plain_answer(model, ragged):
    schedule = SCHEDULES["pre+1+2"]
    with schedule(model) as pruning:
        model.generate(**ragged, max_new_tokens=4, do_sample=False)
        kept = pruning.kept
        out = model.generate(**ragged, max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False)
    images = [1, 2, 2]
    expected, start = [], 0
    for count in images:
        expected += kept[start : start + count] * 3
        start += count
    assert out.shape[0] == 6
    assert all(
        torch.equal(x, y) for a, b in zip(pruning.kept, expected, strict=True) for x, y in zip(a, b, strict=True)
    )


@torch.no_grad()
def test_beam_scores_equal_the_masked_reference(model, one):
    schedule = SCHEDULES["layers 1+3"]
    with schedule(model) as pruning:
        out = model.generate(
            **one, max_new_tokens=5, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True,
            length_penalty=0.0,
        )  # fmt: skip
    first = SimpleNamespace(model=model, kept=pruning.kept[:1])
    gone = gone_from(one, first, schedule)
    new = out.sequences[:, one["input_ids"].shape[1] :]
    total, embeds = 0.0, reference.merged(model, one["input_ids"], one["pixel_values"])
    for token in new[0]:
        scores = reference.logits(model, embeds, torch.ones_like(gone), gone).log_softmax(-1)
        total += scores[0, token].item()
        embeds = torch.cat([embeds, model.get_input_embeddings()(token[None, None])], 1)
        gone = torch.cat([gone, torch.full((1, 1), 10**6)], 1)
    assert out.sequences_scores.item() == pytest.approx(total, abs=1e-4)


@torch.no_grad()
def test_prompt_lookup_decoding_gives_the_greedy_answer(model):
    """Speculated tokens enter several at a time and are cropped from the pruned cache when wrong."""
    inputs = prompt(model, [["image", 5, 6, 7, 8, 3, 5, 6, 7, 5, 6]])
    with SCHEDULES["pre+1+2"](model):
        greedy = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=[model.config.image_token_id]
        )
        looked_up = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            suppress_tokens=[model.config.image_token_id],
            prompt_lookup_num_tokens=3,
        )
    assert torch.equal(greedy, looked_up)


@torch.no_grad()
def test_leaving_the_context_leaves_nothing_behind(model, one):
    model(**one)  # stock code installs its own capture hooks at the first forward

    def snapshot():
        hooks = (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
        )
        return [
            (name, type(m), sorted(m.__dict__), [list(getattr(m, h)) for h in hooks])
            for name, m in model.named_modules()
        ], repr(model.config)

    before, plain = snapshot(), model(**one).logits
    with pytest.raises(KeyError), SCHEDULES["pre"](model):
        model(**one)
        raise KeyError
    assert snapshot() == before
    assert torch.equal(model(**one).logits, plain)


@torch.no_grad()
def test_refusals_name_the_remedy(model, one):
    with pytest.raises(CodebookError, match="layers 0 to"):
        Schedule([Stage(12, 0.5, Random())])(model)
    schedule = SCHEDULES["pre"]
    with schedule(model), pytest.raises(CodebookError, match="one schedule"), schedule(model):
        pass
    with schedule(model):
        with pytest.raises(CodebookError, match=r"static.* cache"):
            model.generate(**one, max_new_tokens=4, cache_implementation="static")
        with pytest.raises(CodebookError, match="DynamicCache"):
            model(**one, past_key_values=StaticCache(config=model.config.text_config, max_cache_len=99))
        with pytest.raises(CodebookError, match="input_ids"):
            model(inputs_embeds=reference.merged(model, one["input_ids"], one["pixel_values"]))
        with pytest.raises(CodebookError, match="text after the image"):
            model(**prompt(model, [[5, "image"]]))
        with pytest.raises(CodebookError, match="whole images"):
            model.generate(**one, max_new_tokens=4, prefill_chunk_size=16)
    model.config._attn_implementation, old = "flash_attention_2", model.config._attn_implementation
    try:
        model.get_decoder().config._attn_implementation = "flash_attention_2"
        with pytest.raises(CodebookError, match="sdpa"):
            schedule(model)
    finally:
        model.config._attn_implementation = model.get_decoder().config._attn_implementation = old
