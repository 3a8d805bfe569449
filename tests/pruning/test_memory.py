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
