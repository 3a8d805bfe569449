"""Llama 4: chunks, which are counted in the unpruned prompt, and queries that are scaled by their place in it."""

import functools

import pytest
import torch

from codebook.errors import CodebookError
from codebook.pruning import DivPrune, FastV, Random, Schedule, Stage
from tests import reference
from tests.models.cells import gone_from, mass
from tests.models.families import FAMILIES

pytestmark = pytest.mark.skipif("llama4" not in FAMILIES, reason="it needs a newer transformers")
ROWS = [["image", 5, 6, 7], [3, "large", 9, 8, 11, 12]]
SCHEDULE = Schedule([Stage(0, 0.5, DivPrune(), mass=True), Stage(1, 0.3, FastV()), Stage(3, 0.2, Random(), mass=True)])
TINY = FAMILIES.get("llama4")


@functools.cache
def scaled(floor, chunk=12):
    """A model that scales queries from so many tokens on, and more than the published ones do."""
    target = TINY.make()
    for layer in target.language_model.model.layers:
        layer.self_attn.floor_scale, layer.self_attn.attn_scale = floor, 2.0
    text = target.config.get_text_config()
    text.floor_scale, text.attention_chunk_size = floor, chunk
    return target


def compare(target, rows, steps):
    inputs = TINY.inputs(rows)
    with SCHEDULE(target) as pruning:
        out = target.generate(
            **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True,
            suppress_tokens=list(TINY.never),
        )  # fmt: skip
    given = TINY.columns(rows), pruning.kept, SCHEDULE.stages
    said = out.sequences[:, inputs["input_ids"].shape[1] :]
    tokens, logits = reference.masked(
        target, inputs, gone_from(inputs, *given), said, suppress=TINY.never, mass=mass(*given)
    )
    assert (torch.stack(out.logits, 1) - logits).abs().max() <= 2e-5 * logits.abs().max()
    assert torch.equal(said, tokens)
    return inputs["input_ids"].shape[1]


@torch.no_grad()
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one", "padded"])
def test_answers_that_pass_the_ends_of_chunks_and_the_first_scale(rows):
    """Chunks begin at a row's first token, scales at the first of the padding."""
    length = TINY.inputs(rows)["input_ids"].shape[1]
    assert compare(scaled(length + 3), rows, 16) == length
    plain = TINY.make()
    assert scaled(length + 3)(**TINY.inputs(rows)).logits.equal(plain(**TINY.inputs(rows)).logits)


@torch.no_grad()
def test_prompts_beyond_the_first_scale_are_refused():
    inputs = TINY.inputs(ROWS[:1])
    length = inputs["input_ids"].shape[1]
    target = scaled(length)
    target(**inputs)
    with (
        SCHEDULE(target),
        pytest.raises(CodebookError, match=rf"of {length} tokens is too long .* at most {length - 1}, with"),
    ):
        target(**inputs)
    with SCHEDULE(target):
        target(input_ids=inputs["input_ids"] % 50)  # of text alone, nothing is dropped


@torch.no_grad()
def test_a_later_turn_counts_chunks_and_scales_in_the_unpruned_prompt():
    inputs, more = TINY.inputs(ROWS), torch.tensor([[25, 26, 27, 28, 29], [30, 31, 32, 33, 34]])
    whole = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], more], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1),
    }
    positions = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    target = scaled(inputs["input_ids"].shape[1] + 2)
    with SCHEDULE(target) as pruning:
        cache = target(**inputs, position_ids=positions[:, :-5], use_cache=True).past_key_values
        now = {"input_ids": more, "attention_mask": whole["attention_mask"], "position_ids": positions[:, -5:]}
        ours = target(**now, past_key_values=cache).logits[:, -1]
    given = TINY.columns(ROWS), pruning.kept, SCHEDULE.stages
    _, theirs = reference.masked(target, whole, gone_from(whole, *given), mass=mass(*given))
    assert (ours - theirs[:, 0]).abs().max() <= 2e-5 * theirs.abs().max()
