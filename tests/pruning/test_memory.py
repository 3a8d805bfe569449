"""Asking again about an image: the tower runs once, and every answer is the one that it would have been."""

import pytest
import torch

from codebook.pruning import Cls, Downsample, Random, Schedule, Stage, Uniform, VisionZip, remember
from tests.prompts import prompt
from tests.tiny import llava

QUESTIONS = [[["image", 7, 8]], [["image", 11, 4, 5]], [["image", 6]]]
SCHEDULES = [
    Schedule([Stage(0, 9, Random())]),
    Schedule([Stage(0, 9, Cls())]),
    Schedule([Stage(0, 9, VisionZip()), Stage(2, 3, Random())]),
    Schedule([Stage(0, 9, Downsample())]),
    Schedule([Stage(1, 9, Uniform())]),
]


def answer(model, inputs, schedule):
    with schedule(model) as pruning:
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return out.sequences, torch.stack(out.logits), pruning.kept


@pytest.fixture(params=["clip", "siglip"])
def model(request):
    return llava(tower=request.param)


@pytest.fixture
def encoded(model):
    """Sizes of the batches of images that the tower has really encoded."""
    sizes = []
    handle = model.model.vision_tower.encoder.register_forward_hook(
        lambda _, args, kwargs, output: sizes.append(kwargs["inputs_embeds"].shape[0]), with_kwargs=True
    )
    yield sizes
    handle.remove()


@torch.no_grad()
def test_the_tower_runs_once_and_answers_are_equal(model, encoded):
    questions = [prompt(model, rows) for rows in QUESTIONS]
    plain = [[answer(model, inputs, schedule) for inputs in questions] for schedule in SCHEDULES]
    encoded.clear()
    with remember(model):
        for schedule, expected in zip(SCHEDULES, plain, strict=True):
            for inputs, (ids, logits, kept) in zip(questions, expected, strict=True):
                again = answer(model, inputs, schedule)
                assert torch.equal(again[0], ids)
                # Remembered features are copies: other strides, which may round the last bit differently.
                torch.testing.assert_close(again[1], logits, atol=1e-5, rtol=0)
                assert all(map(torch.equal, again[2][0], kept[0]))
    assert encoded == [1, 1]  # the image, and once at the smaller size


@torch.no_grad()
def test_only_new_images_are_encoded(model, encoded):
    batch, schedule = prompt(model, [["image", 7, 8], ["image", 9, "image", 5]]), SCHEDULES[1]
    alone = prompt(model, [["image", 7, 8]]) | {"pixel_values": batch["pixel_values"][1:2]}
    expected = answer(model, batch, schedule)
    encoded.clear()
    with schedule(model) as pruning, remember(model):  # either context may be the outer one
        model.generate(**alone, max_new_tokens=1)
        out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert encoded == [1, 2] and torch.equal(out, expected[0])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(pruning.kept, expected[2], strict=True))


@torch.no_grad()
def test_leaving_forgets(model, encoded):
    tower, inputs = model.model.vision_tower, prompt(model, QUESTIONS[0])
    attention = tower.encoder.layers[1].self_attn
    model(**inputs)  # stock code installs its own capture hooks at the first forward
    before = sorted(tower.__dict__), attention.config
    encoded.clear()
    with remember(model):
        with remember(model):
            model(**inputs)
        model(**inputs)
    assert encoded == [1]
    assert (sorted(tower.__dict__), attention.config) == before
    model(**inputs)
    assert encoded == [1, 1]


def other_weights(model):
    tower = model.model.vision_tower
    tower.load_state_dict({name: value.flip(0) for name, value in tower.state_dict().items()})


def other_dtype(model):
    model.bfloat16()


def hook(model):
    attention = model.model.vision_tower.encoder.layers[0].self_attn
    attention.register_forward_hook(lambda _, args, output: (2 * output[0], *output[1:]))


@torch.no_grad()
@pytest.mark.parametrize("change", [other_weights, other_dtype, hook])
def test_a_tower_that_has_changed_is_run_anew(encoded, model, change):
    inputs, schedule = prompt(model, QUESTIONS[0]), SCHEDULES[1]
    with remember(model):
        before = answer(model, inputs, schedule)[1]
        change(model)
        encoded.clear()
        after = [answer(model, inputs, schedule)[1] for _ in range(2)]
    assert encoded == [1]
    expected = answer(model, inputs, schedule)[1]
    assert torch.equal(after[0], after[1]) and (after[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(after[0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_adapter_that_is_switched_off(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*vision_tower.*v_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    inputs = prompt(model, QUESTIONS[0])
    with remember(adapted):
        on = model(**inputs).logits
        with adapted.disable_adapter():
            off = model(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, on, atol=1e-5, rtol=0)
    with adapted.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits, off, atol=1e-5, rtol=0)
    assert (on - off).abs().max() > 1e-3


def test_a_tower_that_learns_has_its_gradients(model):
    inputs, weights = prompt(model, QUESTIONS[0]), list(model.model.vision_tower.parameters())
    model(**inputs).logits.sum().backward()
    expected = [weight.grad for weight in weights]
    model.zero_grad()
    with remember(model):
        for _ in range(2):
            model(**inputs).logits.sum().backward()
    for weight, gradient in zip(weights, expected, strict=True):
        assert (weight.grad is None) is (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(weight.grad, 2 * gradient, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_learns_elsewhere_is_remembered(model, encoded):
    """A frozen tower is not run again for the gradients of the decoder."""
    model.model.vision_tower.requires_grad_(False)
    with remember(model), torch.enable_grad():
        for _ in range(2):
            model(**prompt(model, QUESTIONS[0])).logits.sum().backward()
    assert encoded == [1] and model.lm_head.weight.grad.any()
