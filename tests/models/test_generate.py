"""`generate` in all its forms, on families that differ in positions, masks and caches, against the masked reference."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from codebook.pruning import DivPrune, FastV, Random, Schedule, Stage
from tests import reference
from tests.models.cells import gone_from, mass, model
from tests.models.configs import TEXT
from tests.models.families import FAMILIES
from tests.models.prompts import VIDEO
from tests.tiny import IMAGE

FORMS = [name for name in ("llava_next", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3") if name in FAMILIES]
ROWS = [["image", 5, 6, 7, 5, 6], [3, "large", 9, "image", 8, 11, 12]]
SCHEDULE = Schedule([Stage(0, 0.5, DivPrune()), Stage(2, 0.2, Random(), mass=True), Stage(3, 1, Random())])
PLAIN = {"do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}


@pytest.fixture(params=FORMS)
def tiny(request):
    return FAMILIES[request.param]


def generate(tiny, rows=ROWS, **options):
    """Outputs with each step's logits (B, steps, V), what the reference needs, and the new tokens.

    What it needs: the model, its inputs, when columns are gone, and what they stand for.
    """
    target, inputs = model(tiny.name, "sdpa"), tiny.inputs(rows)
    with SCHEDULE(target) as pruning:
        out = target.generate(
            **inputs,
            **PLAIN | {"suppress_tokens": [*tiny.never]} | options,
            return_dict_in_generate=True,
            output_logits=True,
        )
    columns = tiny.columns(rows)  # copies of a row keep the same
    given = columns, pruning.kept[: len(columns)], SCHEDULE.stages
    return (
        out,
        (target, inputs, gone_from(inputs, *given), mass(*given)),
        out.sequences[:, inputs["input_ids"].shape[1] :],
    )


def masked(given, said, **options):
    return reference.masked(*given[:3], said, **options, mass=given[3])


def repeated(given, times):
    """What the reference needs of `times` copies of a prompt with one image, or of one image after the other."""
    target, inputs, gone, weight = given
    pixels = [name for name in inputs if name in ("pixel_values", "image_sizes", "image_grid_thw")]
    repeats = {name: torch.cat([x] * times) if name in pixels else x.repeat_interleave(times, 0)
               for name, x in inputs.items()}  # fmt: skip
    weight = reference.Mass([(i, *unit[1:]) for i in range(times) for unit in weight.units], weight.stages)
    return target, repeats, gone[:1].repeat_interleave(times, 0), weight


def assert_close(ours, theirs, tolerance=2e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy(name):
    out, given, tokens = generate(FAMILIES[name], max_new_tokens=8)
    expected, logits = masked(given, tokens, suppress=FAMILIES[name].never)
    assert_close(torch.stack(out.logits, 1), logits, FAMILIES[name].tolerance)
    assert torch.equal(tokens, expected)


@torch.no_grad()
def test_sampling_several_sequences(tiny):
    torch.manual_seed(3)
    out, given, tokens = generate(
        tiny, ROWS[:1], max_new_tokens=4, do_sample=True, num_return_sequences=2, top_k=0, temperature=3.0
    )
    assert not torch.equal(tokens[0], tokens[1])
    _, logits = masked(repeated(given, 2), tokens)
    assert_close(torch.stack(out.logits, 1), logits)


@torch.no_grad()
def test_beams(tiny):
    out, given, tokens = generate(
        tiny, ROWS[:1], max_new_tokens=4, num_beams=3, num_return_sequences=3, output_scores=True, length_penalty=0.0
    )
    _, logits = masked(repeated(given, 3), tokens)
    total = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0].sum(1)
    # suppressed tokens leave their probability unused
    assert torch.allclose(out.sequences_scores, total, atol=1e-4)


@torch.no_grad()
def test_prompt_lookup(tiny):
    if tiny.name == "qwen3_5":
        pytest.skip("stock generate does not guess ahead in models with recurrent layers, which cannot go back")
    _, _, greedy = generate(tiny, ROWS[:1], max_new_tokens=8)
    _, _, tokens = generate(tiny, ROWS[:1], max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert torch.equal(tokens, greedy)


@torch.no_grad()
def test_an_assistant():
    """Where a processor makes token types, stock `generate` wants an assistant that takes them: none of these does."""
    torch.manual_seed(0)
    assistant = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    assistant.generation_config.pad_token_id, assistant.generation_config.eos_token_id = 0, None
    tiny = FAMILIES["llava_next"]
    _, _, greedy = generate(tiny, ROWS[:1], max_new_tokens=8)
    _, _, tokens = generate(tiny, ROWS[:1], max_new_tokens=8, assistant_model=assistant)
    assert torch.equal(tokens, greedy)


@torch.no_grad()
def test_streaming(tiny):
    class Streamer:
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value.flatten())

        def end(self):
            self.got = torch.cat(self.got)

    streamer = Streamer()
    out, _, _ = generate(tiny, ROWS[:1], max_new_tokens=4, streamer=streamer)
    assert torch.equal(streamer.got, out.sequences[0])


@torch.no_grad()
def test_without_a_cache(tiny):
    out, given, tokens = generate(tiny, max_new_tokens=4, use_cache=False)
    expected, logits = masked(given, tokens, suppress=[IMAGE, VIDEO])
    assert_close(torch.stack(out.logits, 1), logits)
    assert torch.equal(tokens, expected)


@torch.no_grad()
def test_manual_loop(tiny):
    """One row: stock models need explicit positions for padded ones, pruned or not."""
    out, (target, inputs, *_), tokens = generate(tiny, ROWS[:1], max_new_tokens=4)
    with SCHEDULE(target):
        step = target(**inputs, use_cache=True)
        for i in range(3):
            assert_close(step.logits[:, -1], out.logits[i])
            step = target(input_ids=tokens[:, i : i + 1], past_key_values=step.past_key_values)
    assert_close(step.logits[:, -1], out.logits[3])


@torch.no_grad()
@pytest.mark.parametrize("types", [False, True])
def test_a_second_turn_on_the_pruned_cache(tiny, types):
    """With and without the token types of the whole conversation, which some processors make."""
    first, (target, inputs, gone, weight), _ = generate(tiny, ROWS[:1], max_new_tokens=3)
    more = torch.cat([first.sequences, torch.tensor([[31, 32, 33]])], 1)
    added = more.shape[1] - gone.shape[1]
    whole = inputs | {"input_ids": more, "attention_mask": torch.ones_like(more)}
    for name in {"mm_token_type_ids", "token_type_ids"} & set(inputs):
        whole[name] = torch.nn.functional.pad(inputs[name], (0, added))
    given = {name: whole[name] for name in ("token_type_ids",) if types and name in whole}
    with SCHEDULE(target):
        second = target.generate(
            input_ids=more, attention_mask=torch.ones_like(more), past_key_values=first.past_key_values,
            max_new_tokens=4, return_dict_in_generate=True, output_logits=True, **PLAIN, **given,
        )  # fmt: skip
    gone = torch.nn.functional.pad(gone, (0, added), value=10**6)
    said = second.sequences[:, more.shape[1] :]
    tokens, logits = masked((target, whole, gone, weight), said, suppress=[IMAGE, VIDEO])
    assert_close(torch.stack(second.logits, 1), logits)
    assert torch.equal(said, tokens)


@torch.no_grad()
def test_labels_and_shapes(tiny):
    target, inputs = model(tiny.name, "sdpa"), tiny.inputs(ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 90, -100)
    plain = target(**inputs, labels=labels, output_hidden_states=True)
    with SCHEDULE(target):
        out = target(**inputs, labels=labels, output_hidden_states=True)
        last = target(**inputs, logits_to_keep=2).logits
    assert out.logits.shape == plain.logits.shape and out.loss.isfinite() and out.loss != plain.loss
    assert torch.equal(last, out.logits[:, -2:])
    lengths = [hidden.shape[1] for hidden in out.hidden_states]  # of each layer as it ran: the first is pruned as well
    assert lengths[0] < inputs["input_ids"].shape[1] and sorted(lengths[:4], reverse=True) == lengths[:4]
    assert lengths[3] < lengths[2]


def windowed():
    """A LLaVA-NeXT whose decoder looks back over 20 tokens in every layer."""
    tiny = copy.copy(FAMILIES["llava_next"])
    config = tiny.config()
    config.text_config.sliding_window = 20
    tiny.config = lambda: config
    return tiny, tiny.make()


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "windowed"])
def test_sliding_windows_after_a_long_unpruned_turn(name):
    """The cache has lost what left the window when the image comes, and the pruned one goes on from there."""
    tiny, target = windowed() if name == "windowed" else (FAMILIES[name], model(name, "sdpa"))
    schedule = Schedule([Stage(0, 0.5, Random(), mass=True), Stage(2, 0.2, FastV(), mass=True)])
    rows = [[3, "image", 8, 9]]
    first, second = tiny.inputs([[i % 17 + 1 for i in range(30)]]), tiny.inputs(rows)
    cache, length = DynamicCache(config=target.config), second["input_ids"].shape[1]
    target(**first, past_key_values=cache, use_cache=True)
    more, places = torch.tensor([[33, 34]]), torch.arange(30, 32 + length)[None]
    with schedule(target) as pruning:
        mask = {"attention_mask": torch.ones(1, 30 + length, dtype=torch.long)}
        out = [target(**second | mask, position_ids=places[:, :length], past_key_values=cache).logits[:, -1:]]
        out.append(target(input_ids=more, position_ids=places[:, length:], past_key_values=cache).logits)
    whole = second | {name: torch.cat([first[name], second[name]], 1) for name in first}
    columns = tiny.columns(rows)
    gone = gone_from(second, columns, pruning.kept, schedule.stages)
    gone = torch.nn.functional.pad(gone, (30, 0), value=10**6)
    columns = [(row, grids, places + 30) for row, grids, places in columns]
    weight = mass(columns, pruning.kept, schedule.stages)
    _, logits = masked((target, whole, gone, weight), torch.cat([more, more[:, :1]], 1))
    assert_close(torch.cat(out, 1), logits)
