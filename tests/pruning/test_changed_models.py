"""Models that change while a context is open on them, and models that share their parts: pruned right, or refused."""

import copy
import functools

import pytest
import torch

import codebook
from codebook.errors import CodebookError
from codebook.pruning import FastV, Random, Schedule, Stage, Uniform, remember
from tests.prompts import ONE, prompt
from tests.tiny import llava

SCHEDULE = Schedule([Stage(0, 0.5, Random(), mass=True), Stage(2, 4, FastV())])


@pytest.fixture
def model():
    return llava()


@pytest.fixture
def one(model):
    return prompt(model, ONE)


def other_layer(model):
    model.get_decoder().layers[2] = copy.deepcopy(llava().get_decoder().layers[2])


def fewer_layers(model):
    del model.get_decoder().layers[3]


def other_decoder(model):
    model.model.language_model = llava().model.language_model


@torch.no_grad()
@pytest.mark.parametrize("change", [other_layer, fewer_layers, other_decoder])
def test_parts_put_in_the_place_of_hooked_ones_are_refused(model, one, change):
    """What replaces them has no hooks, and would run unpruned."""
    with SCHEDULE(model):
        change(model)
        with pytest.raises(CodebookError, match=r"parts of the decoder were replaced .*: leave it and open it again"):
            model(**one)
    model(**one)
    with SCHEDULE(model) if change is not fewer_layers else Schedule([Stage(1, 5, FastV())])(model) as pruning:
        model(**one)
    assert len(pruning.kept[0][-1]) < 6


@torch.no_grad()
@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule([Stage(2, 4, FastV())])], ids=str)
@pytest.mark.parametrize("before, after", [("sdpa", "eager"), ("eager", "sdpa")])
def test_another_attention_is_used(schedule, before, after):
    """Also in the layers that the context has made hand over what they attend with: masks are of its kind."""
    model = llava(before)
    inputs = prompt(model, ONE)
    with schedule(model) as pruning:
        expected, kept = model(**inputs).logits, pruning.kept
        model.set_attn_implementation(after)
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(pruning.kept[0], kept[0], strict=True))


@torch.no_grad()
def test_another_attention_is_refused(model, one):
    with SCHEDULE(model):
        model.get_decoder().config._attn_implementation = "flash_attention_2"
        with pytest.raises(CodebookError, match="'flash_attention_2' is not supported on cpu: load the model with"):
            model(**one)


@torch.no_grad()
def test_what_was_enabled_can_be_disabled_when_the_model_was_compiled_since(model, one):
    plain = model(**one).logits
    codebook.enable(model, SCHEDULE)
    pruned = model(**one).logits
    model.compile(backend="eager")
    codebook.disable(model)
    model._compiled_call_impl = None
    assert torch.equal(model(**one).logits, plain) and not torch.equal(plain, pruned)


@torch.no_grad()
def test_contexts_on_a_model_and_on_the_model_inside_it(model, one):
    """One attachment for both: hooks of two would each shorten what the other has shortened."""
    with SCHEDULE(model):
        expected = model(**one).logits
        with pytest.raises(CodebookError, match="instead of nesting"):
            SCHEDULE(model.model).__enter__()
        with Schedule([])(model.model, "thread"):
            assert not torch.equal(model(**one).logits, expected)
        assert torch.equal(model(**one).logits, expected)
        with pytest.raises(CodebookError, match="part of another LlavaForConditionalGeneration: open both contexts on"):
            SCHEDULE(copy.copy(model), "thread").__enter__()
    with SCHEDULE(model.model):
        assert torch.equal(model(**one).logits, expected)
        with pytest.raises(CodebookError, match=r"this LlavaForConditionalGeneration .* another LlavaModel: open"):
            SCHEDULE(model, "thread").__enter__()
    assert not model.model._forward_pre_hooks and "generate" not in vars(model)


def test_leaving_twice(model):
    pruning = SCHEDULE(model)
    pruning.__exit__(None, None, None)
    with pruning:
        pass
    pruning.__exit__(None, None, None)
    with pruning:
        pass
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_an_assistant_that_is_pruned_as_well(model, one):
    """It is shown no images, as in stock `generate`: those that wait to be shown are the other model's."""
    options = {"max_new_tokens": 8, "do_sample": False}
    with SCHEDULE(model), Schedule([Stage(1, 5, Uniform())])(assistant := llava(seed=1)):
        greedy = model.generate(**one, **options)
        assert torch.equal(model.generate(**one, **options, assistant_model=assistant), greedy)


@torch.no_grad()
def test_what_is_put_around_a_model_inside_a_context_stays(model, one):
    """As accelerate puts a `forward` around one, where it casts or moves: leaving took it away."""
    plain, calls = model(**one).logits, []
    with SCHEDULE(model), remember(model):
        pruned, tokens = model(**one).logits, model.generate(**one, max_new_tokens=3, do_sample=False)
        tower = model.model.vision_tower
        for owner, name in ((model, "forward"), (model, "generate"), (model.model, "forward"), (tower, "forward")):

            @functools.wraps(stock := getattr(owner, name))
            def around(*args, stock=stock, name=(owner, name), **kwargs):
                calls.append(name)
                return stock(*args, **kwargs)

            setattr(owner, name, around)
        assert torch.equal(model(**one).logits, pruned)
    calls.clear()
    assert torch.equal(model(**one).logits, plain)
    assert calls == [(model, "forward"), (model.model, "forward"), (tower, "forward")]
    with SCHEDULE(model), remember(model):
        assert torch.equal(model(**one).logits, pruned)
        for use_cache in (True, False):
            again = model.generate(**one, max_new_tokens=3, do_sample=False, use_cache=use_cache)
            assert torch.equal(again, tokens)
    assert (model, "generate") in calls


@torch.no_grad()
def test_a_stage_whose_layer_is_not_run(model, one):
    with SCHEDULE(model):
        model.get_decoder().config.num_hidden_layers = 2
        with pytest.raises(
            CodebookError, match="layer 2 of the decoder was not run, so that its stage has pruned noth"
        ):
            model(**one)
        model.get_decoder().config.num_hidden_layers = 3
        model(**one)
