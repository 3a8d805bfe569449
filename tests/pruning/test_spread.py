"""Images that keep in proportion to how their tokens differ."""

import math
import statistics

import numpy as np
import pytest
import torch

from codebook import load
from codebook.errors import CodebookError
from codebook.pruning import Random, RedundancyThreshold, Schedule, Stage, Uniform
from codebook.store.codebook import Codebook
from codebook.store.spread import spread
from tests import reference
from tests.prompts import ONE, RAGGED, assert_close, gone_from, mass, prompt, size
from tests.tiny import llava


def test_spread_by_hand():
    # Their mean points to (2, 1): the cosines are 2/sqrt(5) twice and 1/sqrt(5), which differ by sqrt(2)/3/sqrt(5).
    tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert float(spread(tokens)) == pytest.approx(math.sqrt(2) / 3 / math.sqrt(5))
    assert float(spread(tokens.bfloat16())) == pytest.approx(math.sqrt(2) / 3 / math.sqrt(5), abs=1e-6)
    assert float(spread(tokens[:1])) == 0


@pytest.fixture(scope="module", params=["tiny", "miniature"])
def model(request):
    if request.param == "tiny":
        return llava("sdpa")
    model, processor = load("miniature", "cpu")
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def inputs(model):
    """Five images, from plain to noisy."""
    inputs = prompt(model, RAGGED)
    side = inputs["pixel_values"].shape[-1]
    for i, busy in enumerate((0, 1, 2, 8, side)):  # so many columns of noise on a nearly plain ground
        # Quite plain, which kept token a dropped one is most like would be a matter of rounding.
        ground = inputs["pixel_values"][i, :, :, busy:]
        ground.mul_(0.1).add_(0.5)
    return inputs


def spreads(model, pixels):
    """Of each image, in numpy."""
    with torch.no_grad():
        images = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    found = []
    for features in (image.double().numpy() for image in images):
        mean = features.mean(0)
        found.append(np.std(features @ mean / np.linalg.norm(features, axis=1) / np.linalg.norm(mean)))
    return found


@torch.no_grad()
def test_images_keep_by_their_spread(model, inputs):
    """... in both stages, exactly as many; and generation is that of the masked reference, with mass too."""
    own, n = spreads(model, inputs["pixel_values"]), size(model)
    usual = statistics.median(own)
    stages = [Stage(0, 0.25, Uniform(), mass=True), Stage(2, 3, Random())]
    schedule = Schedule(stages, spread=usual)
    with schedule(model) as pruning:
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    portions = [min(2, max(0.5, value / usual)) for value in own]
    assert min(portions) < 0.9 and max(portions) > 1.1 and len(set(portions)) > 3
    wanted = [[max(1, round(count * portion)) for count in (round(0.25 * n), 3)] for portion in portions]
    assert [[len(kept) for kept in image] for image in pruning.kept] == wanted
    gone = gone_from(inputs, pruning, schedule)
    said = out.sequences[:, inputs["input_ids"].shape[1] :]
    given = model, inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], gone, said
    tokens, logits = reference.generate(*given, mass=mass(inputs, pruning, schedule))
    assert torch.equal(said, tokens)
    assert_close(torch.stack(out.logits, 1), logits)


@torch.no_grad()
def test_an_image_keeps_the_same_alone_and_in_a_batch(model, inputs):
    usual = statistics.median(spreads(model, inputs["pixel_values"]))
    schedule = Schedule([Stage(0, 0.25, Uniform())], spread=usual)
    with schedule(model) as together:
        model(**inputs)
    for i, pixels in enumerate(inputs["pixel_values"]):
        with schedule(model) as alone:
            model(**prompt(model, ONE) | {"pixel_values": pixels[None]})
        assert torch.equal(alone.kept[0][0], together.kept[i][0])


def test_no_image_keeps_more_than_it_has(model, inputs):
    with torch.no_grad(), Schedule([Stage(0, 1.0, Random()), Stage(2, 0.9, Random())], spread=1e-6)(model) as pruning:
        model(**inputs)
    assert {tuple(map(len, image)) for image in pruning.kept} == {(size(model), size(model))}


def book(**config):
    return Codebook(torch.eye(4), None, config)


def test_truth_is_no_spread():
    with pytest.raises(CodebookError, match="spread must be a number above 0, the usual spread of images, not True"):
        Schedule([Stage(0, 9, Uniform())], spread=True)


def test_text():
    schedule = Schedule.parse("uniform:9, random@2:3; spread=0.25; positions=compact")
    assert schedule == Schedule([Stage(0, 9, Uniform()), Stage(2, 3, Random())], "compact", spread=0.25)
    assert str(schedule) == "uniform:9, random@2:3; positions=compact; spread=0.25"
    of_book = Schedule.solve("codebook; spread=codebook", book(spread=0.125), keep=0.25, n=16, layers=4)
    assert of_book.spread == 0.125 and str(of_book) == "codebook:4; spread=0.125"
    assert of_book.counts(16, 4) == [4] * 4  # of an image with the usual spread


@pytest.mark.parametrize(
    ("text", "own", "says"),
    [
        ("uniform:9; spread=wide", None, "cannot read the spread 'wide'"),
        ("uniform:9; spread=0", None, "spread must be a number above 0"),
        ("uniform:9; spread=nan", None, "spread must be a number above 0"),
        ("uniform:9; spread=codebook", None, "no stage has a codebook"),
        ("codebook:9; spread=codebook", book(), "does not say the spread"),
        ("uniform:9; speed=2", None, "spread=codebook or a number"),
    ],
)
def test_refusals(text, own, says):
    with pytest.raises(CodebookError, match=says):
        Schedule.parse(text, own)


def test_adaptive_stages_have_budgets_of_their_own():
    with pytest.raises(CodebookError, match="leave spread out"):
        Schedule([Stage(0, None, RedundancyThreshold(book()))], spread=0.2)
