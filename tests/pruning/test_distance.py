"""RESTORE's distance calibration: its formula, and pruning with it against stock layers whose masks have it added."""

import math

import pytest
import torch

from codebook import load
from codebook.errors import CodebookError
from codebook.pruning import DivPrune, FastV, Merged, Random, Schedule, Stage
from codebook.pruning.distance import distance_bias
from codebook.pruning.methods.base import Pruner
from tests import reference
from tests.models import cells
from tests.models.families import FAMILIES
from tests.prompts import ONE, RAGGED, assert_close, gone_from, mass, prompt
from tests.tiny import llava

STEPS = 4
SCHEDULES = {
    "before the LLM, then at 2": Schedule([Stage(0, 0.3, Random(), "distance"), Stage(2, 3, FastV(), "distance")]),
    "from layer 1 on": Schedule([Stage(1, 0.3, Random(), "distance")]),
    "renumbered": Schedule([Stage(0, 0.3, Random(), "distance")], positions="compact"),
}
GENERATE = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def frequencies(parameters, width):
    return parameters["rope_theta"] ** (-torch.arange(0, width, 2) / width)


@torch.no_grad()
def test_the_formula_number_by_number():
    """Against a plain loop; hand-worked at distances 0 and pi."""
    theta, positions = [1.0, 0.1, 0.01], [0, 3, 4, 40, 900]
    angles = torch.tensor([[p * t for t in theta] for p in positions])
    table = torch.cat([angles, angles], -1)
    found = distance_bias((table.cos(), table.sin()), (table[1:].cos(), table[1:].sin()))
    for i, m in enumerate(positions):
        for j, n in enumerate(positions[1:]):
            decay = sum(math.cos(abs(m - n) * t) for t in theta) / 3
            assert float(found[i, j]) == pytest.approx(math.log(2 - decay), abs=1e-6)
    scaled = distance_bias((2 * table.cos(), 2 * table.sin()), (2 * table[1:].cos(), 2 * table[1:].sin()))
    assert torch.allclose(scaled, found, atol=1e-6)  # as YaRN scales them
    turn = torch.tensor([[0.0], [math.pi]])
    by_hand = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])
    assert torch.allclose(distance_bias((turn.cos(), turn.sin()), (turn.cos(), turn.sin())), by_hand, atol=1e-6)


@pytest.fixture(scope="module", params=["tiny, sdpa", "tiny, eager", "miniature, sdpa"])
def model(request):
    name, attention = request.param.split(", ")
    if name == "tiny":
        return llava(attention)
    model, processor = load("miniature", "cpu")
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = None  # never stops early
    return model


def far(model, inputs, pruning, schedule):
    """For the reference; compact positions are counted as the columns that are left."""
    text, valid = model.config.text_config, inputs["attention_mask"]
    gone = gone_from(inputs, pruning, schedule)
    width = text.hidden_size // text.num_attention_heads
    theta = frequencies(text.rope_parameters, width)

    def angles(layer):
        there = valid * (gone > layer) if schedule.positions == "compact" else valid
        return (there.cumsum(1) - 1)[..., None] * theta

    return reference.Far(mass(inputs, pruning, schedule), angles)


@torch.no_grad()
@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged, several images"])
@pytest.mark.parametrize("name", ["before the LLM, then at 2", "from layer 1 on"])
def test_generate_equals_masked_reference(model, name, rows):
    inputs, schedule = prompt(model, rows), SCHEDULES[name]
    with schedule(model) as pruning:
        out = model.generate(**inputs, **GENERATE)
    gone, calibration = gone_from(inputs, pruning, schedule), far(model, inputs, pruning, schedule)
    given = model, inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], gone, STEPS
    tokens, logits = reference.generate(*given, mass=calibration)
    assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], tokens)
    ours = torch.stack(out.logits, 1)
    assert_close(ours, logits)
    # It matters, and so do its parts: distance, and the sizes of layer 0.
    for less in (calibration.mass, reference.Far(calibration.mass, lambda layer: None)):
        assert (ours - reference.generate(*given, mass=less)[1]).abs().max() > 1e-4 * logits.abs().max()
    with schedule(model):
        plain = model.generate(**inputs, **GENERATE, use_cache=False)
    assert torch.equal(plain.sequences, out.sequences)
    assert_close(torch.stack(plain.logits, 1), logits)


def angles_of(name, target, inputs):
    """The angle of each frequency of each layer at each column, from the config and the stock model's positions."""
    text, seen = target.config.get_text_config(), []

    def hear(_, args, kwargs):
        seen.append(args[1] if len(args) > 1 else kwargs["position_ids"])

    with target.get_decoder().rotary_emb.register_forward_pre_hook(hear, with_kwargs=True):
        target.generate(**inputs, max_new_tokens=1)
    at = seen[0].float()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = text.rope_parameters
    if name == "gemma3":  # windows and full layers have frequencies of their own
        return lambda layer: at[..., None] * frequencies(rope[text.layer_types[layer]], width)
    if name == "aya_vision":
        return lambda layer: at[..., None] * frequencies(rope, width) if "slid" in text.layer_types[layer] else None
    theta = frequencies(rope, int(width * rope.get("partial_rotary_factor", 1)))
    axis = [axis for axis, count in enumerate(rope["mrope_section"]) for _ in range(count)]
    return lambda layer: torch.stack([at[a] * t for a, t in zip(axis, theta, strict=True)], -1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in ("gemma3", "aya_vision", "qwen2_vl", "glm4v") if name in FAMILIES])
def test_families_with_frequencies_of_their_own(name, attention):
    """Per layer, in some layers alone, for three axes, and for a part of each head."""
    tiny, target = FAMILIES[name], cells.model(name, attention)
    rows = [["image", 5, 6, 7], [3, 4, "large", 9, 8, 11, 12]]
    inputs, columns = tiny.inputs(rows), tiny.columns(rows)
    schedule = Schedule([Stage(0, 0.4, Random(), "distance"), Stage(2, 0.2, Random(), "distance")])
    with schedule(target) as pruning:
        out = target.generate(**inputs, **GENERATE, suppress_tokens=list(tiny.never))
    counts = cells.mass(columns, pruning.kept, schedule.stages)
    calibration = reference.Far(counts, angles_of(name, target, inputs))
    given = target, inputs, cells.gone_from(inputs, columns, pruning.kept, schedule.stages), STEPS
    tokens, logits = reference.masked(*given, suppress=tiny.never, mass=calibration)
    assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], tokens)
    ours = torch.stack(out.logits, 1)
    assert_close(ours, logits, tiny.tolerance)
    less = reference.masked(*given, suppress=tiny.never, forced=tokens, mass=counts)[1]
    assert (ours - less).abs().max() > 100 * tiny.tolerance * logits.abs().max()
