"""RESTORE's distance calibration: its formula, and pruning with it against stock layers whose masks have it added."""

import math

import pytest
import torch

from codebook import load
from codebook.errors import CodebookError
from codebook.models import family
from codebook.models.base import decoder
from codebook.pruning import DivPrune, FastV, Merged, Random, Schedule, Stage
from codebook.pruning.distance import distance_bias
from tests import reference
from tests.models import cells
from tests.models.families import FAMILIES
from tests.prompts import ONE, RAGGED, assert_close, gone_from, mass, prompt
from tests.tiny import llava

STEPS = 4
SCHEDULES = {
    # What the last stage keeps still stands for what it stood for, at a distance.
    "before the LLM, then at 2": Schedule(
        [Stage(0, 0.3, Random(), "distance"), Stage(2, 3, FastV(), "distance"), Stage(3, 2, Random())]
    ),
    "from layer 1 on": Schedule([Stage(1, 0.3, Random(), "distance")]),
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


def test_the_formula_under_autocast():
    angles = torch.arange(40.0)[:, None] * torch.tensor([1.0, 0.1])
    table = angles.cos(), angles.sin()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance_bias(table, table), distance_bias(table, table).float())
        found = distance_bias(table, table)
    assert torch.equal(found, distance_bias(table, table))


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
    theta = frequencies(text.rope_parameters, text.hidden_size // text.num_attention_heads)

    def angles(layer):
        there = valid * (gone > layer) if schedule.positions == "compact" else valid
        return (there.cumsum(1) - 1)[..., None] * theta

    return reference.Far(mass(inputs, pruning, schedule), angles)


def run(model, inputs, schedule, **options):
    """Prompt's and new tokens, each step's logits, and the context."""
    with schedule(model) as pruning:
        out = model.generate(**inputs, **GENERATE, **options)
    return out.sequences, torch.stack(out.logits, 1), pruning


@torch.no_grad()
@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged, several images"])
@pytest.mark.parametrize("name", ["before the LLM, then at 2", "from layer 1 on"])
def test_generate_equals_masked_reference(model, name, rows):
    inputs, schedule = prompt(model, rows), SCHEDULES[name]
    sequences, ours, pruning = run(model, inputs, schedule)
    gone, calibration = gone_from(inputs, pruning, schedule), far(model, inputs, pruning, schedule)
    said = sequences[:, inputs["input_ids"].shape[1] :]
    given = model, inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], gone, said
    tokens, logits = reference.generate(*given, mass=calibration)
    assert torch.equal(said, tokens)
    assert_close(ours, logits)
    # It matters, and so do its parts: distance, and the sizes of layer 0.
    for less in (calibration.mass, reference.Far(calibration.mass, lambda layer: None)):
        assert (ours - reference.generate(*given, mass=less)[1]).abs().max() > 1e-4 * logits.abs().max()


@torch.no_grad()
def test_other_ways_to_generate_agree():
    """Without a cache each step reads the prompt again; guesses come beside it. Their queries are not the prompt's."""
    model, schedule = llava(), SCHEDULES["before the LLM, then at 2"]
    inputs = prompt(model, RAGGED)
    sequences, logits, _ = run(model, inputs, schedule)
    other, theirs, _ = run(model, inputs, schedule, use_cache=False)
    assert torch.equal(other, sequences)
    assert_close(theirs, logits)
    inputs = prompt(model, ONE)
    sequences, _, _ = run(model, inputs, schedule)
    with schedule(model):
        guessed = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(guessed, sequences)


@torch.no_grad()
def test_positions_that_are_renumbered():
    """Distances are those of the positions that the model is given."""
    model, schedule = llava(), Schedule([Stage(0, 0.3, Random(), "distance")], positions="compact")
    inputs = prompt(model, RAGGED)
    sequences, ours, pruning = run(model, inputs, schedule)
    calibration = far(model, inputs, pruning, schedule)
    said = sequences[:, inputs["input_ids"].shape[1] :]
    tokens, logits = reference.masked(
        model, inputs, gone_from(inputs, pruning, schedule), said, compact=True, mass=calibration
    )
    assert torch.equal(said, tokens)
    assert_close(ours, logits)


@torch.no_grad()
def test_a_later_turn_sees_sizes_alone():
    """What was read with the image has the term of distance, what comes later has not."""
    model, schedule = llava(), SCHEDULES["before the LLM, then at 2"]
    inputs, more = prompt(model, ONE), torch.tensor([[31, 32, 33]])
    with schedule(model) as pruning:
        cache = model(**inputs, use_cache=True).past_key_values
        ours = model(input_ids=more, past_key_values=cache).logits[:, -1]
    calibration, gone = far(model, inputs, pruning, schedule), gone_from(inputs, pruning, schedule)
    ids = torch.cat([inputs["input_ids"], more], 1)
    gone = torch.cat([gone, torch.full_like(more, 10**6)], 1)
    embeds = reference.merged(model, ids, inputs["pixel_values"])
    assert_close(ours, reference.logits(model, embeds, torch.ones_like(ids), gone, mass=calibration))


@torch.no_grad()
@pytest.mark.parametrize("at", [1, 2])
def test_methods_see_the_attention_that_the_model_has(at):
    """Of layer 0 with its own sizes, and of a later one: rows equal the stock maps of the layer as it ran."""

    class Spy(FastV):
        def score(self, tokens):
            seen.append((super().score(tokens), tokens.attention.rows(tokens.attention.places)))
            return seen[-1][0]

    model, seen = llava("eager"), []
    inputs = prompt(model, ONE)
    start, count = ONE[0].index("image"), 12
    with Schedule([Stage(0, count, Random(), "distance"), Stage(at, 3, Spy())])(model):
        maps = model(**inputs, output_attentions=True).attentions[at - 1][0].mean(0)
    [(score, rows)], own = seen, slice(start, start + count)
    assert torch.allclose(score, maps[-1, own], atol=1e-6)
    assert torch.allclose(rows, maps[own, own], atol=1e-6)


@torch.no_grad()
def test_where_nothing_is_dropped_nothing_changes():
    model = llava()
    inputs = prompt(model, RAGGED)
    plain = model(**inputs).logits
    with Schedule([Stage(0, 1.0, Random(), "distance")])(model):
        assert torch.equal(model(**inputs).logits, plain)


def test_what_is_said_of_it(tmp_path):
    """In texts, files and by name; `+distance` says more than `+mass`."""
    schedule = Schedule([Stage(0, 0.25, Random(), "distance"), Stage(9, 4, Random(), True)])
    assert str(schedule) == "random:0.25+distance, random@9:4+mass" and Schedule.parse(str(schedule)) == schedule
    assert Schedule.parse("random:0.25 + distance, random@9:4+mass") == schedule
    schedule.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == schedule
    assert Schedule.parse("restore:64") == Schedule([Stage(0, 64, Merged(DivPrune()), "distance")])
    assert Schedule.parse("restore@2:64+mass") == Schedule([Stage(2, 64, Merged(DivPrune()), "distance")])
    hybrid = Schedule.solve("divprune+distance+random", keep=0.11, n=576, layers=32)
    assert str(hybrid) == "divprune:93+distance, random@20:13"
    assert str(Schedule.parse("seeded:9+distance", "book")) == "codebook-farthest:9+distance"
    for other in ("far", None, 2):
        with pytest.raises(CodebookError, match="mass must be True, False or 'distance', not"):
            Stage(0, 0.25, Random(), other)
    with pytest.raises(CodebookError, match="leave mass out"):
        Schedule.parse("drop@3+distance")
    with pytest.raises(CodebookError, match=r"'4[+]mass' is not a number"):
        Schedule.parse("random:4+mass+distance")


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
    sequences, ours, pruning = run(target, inputs, schedule, suppress_tokens=list(tiny.never))
    counts = cells.mass(columns, pruning.kept, schedule.stages)
    calibration = reference.Far(counts, angles_of(name, target, inputs))
    said = sequences[:, inputs["input_ids"].shape[1] :]
    given = target, inputs, cells.gone_from(inputs, columns, pruning.kept, schedule.stages), said
    tokens, logits = reference.masked(*given, suppress=tiny.never, mass=calibration)
    assert torch.equal(said, tokens)
    assert_close(ours, logits, tiny.tolerance)
    less = reference.masked(*given, mass=counts)[1]
    assert (ours - less).abs().max() > 100 * tiny.tolerance * logits.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_rotary_embeddings_are_cosines_and_sines_of_the_same_angles(name):
    """In every family and layer: the similarity of two positions is the mean cosine of their angles' differences."""
    target, seen = cells.model(name, "sdpa"), []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(family(target).rotary(kwargs["position_embeddings"])), with_kwargs=True
        )
        for layer in decoder(target).layers
        if hasattr(layer, "self_attn")
    ]
    inputs = FAMILIES[name].inputs([["image", 5, 6, 7]])
    target(**inputs)
    for hook in hooks:
        hook.remove()
    assert seen
    for cos, sin in seen:
        assert cos.shape == sin.shape and cos.dim() == 3 and cos.shape[1] == inputs["input_ids"].shape[1]
        assert torch.allclose(cos**2 + sin**2, torch.ones_like(cos), atol=1e-5)
        angles = torch.atan2(sin, cos)
        differences = angles[:, :, None] - angles[:, None]
        expected = torch.log(2 - differences.cos().mean(-1))
        assert torch.allclose(distance_bias((cos, sin), (cos, sin)), expected, atol=1e-5)
