"""A cache that is pruned, and what comes after: right by the masked reference, or refused before the forward."""

import pytest
import torch

from codebook.errors import CodebookError
from codebook.pruning import FastV, Random, Schedule, Stage, Uniform
from tests import reference
from tests.prompts import ONE, RAGGED, assert_close, gone_from, mass, prompt
from tests.tiny import llava

PRE = [Stage(0, 0.3, Random())]
DEEP = Schedule([Stage(2, 0.3, Random(), mass=True)])
LATE = 10**6
"""First layer that no longer sees a column that is never dropped."""
TURN = torch.tensor([[21, 22, 23, 24]])


@pytest.fixture(scope="module")
def model():
    return llava()


@pytest.fixture
def one(model):
    return prompt(model, ONE)


def expected(model, inputs, pruning, schedule, more, valid=None, compact=False):
    """The last logits of the reference where (B, n) tokens come after a prompt that was pruned."""
    gone = torch.cat([gone_from(inputs, pruning, schedule), torch.full_like(more, LATE)], 1)
    valid = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1) if valid is None else valid
    embeds = reference.merged(model, torch.cat([inputs["input_ids"], more], 1), inputs["pixel_values"])
    places = ((gone == LATE).long().cumsum(1) - 1) if compact else None
    return reference.logits(model, embeds, valid, gone, places, mass=mass(inputs, pruning, schedule))


@torch.no_grad()
@pytest.mark.parametrize("others", ["keep", "compact", "unpruned"])
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_positions_go_on_as_the_cache_has_them(model, one, positions, others):
    """Whatever the schedule of the context in which it is continued."""
    schedule = Schedule(PRE, positions=positions)
    other = Schedule([]) if others == "unpruned" else Schedule([Stage(1, 5, Uniform())], positions=others)
    with schedule(model) as pruning:
        cache = model(**one, use_cache=True).past_key_values
    with other(model):
        ours = [model(input_ids=part, past_key_values=cache).logits[:, -1] for part in TURN.split([3, 1], 1)]
    for logits, length in zip(ours, (3, 4), strict=True):
        wanted = expected(model, one, pruning, schedule, TURN[:, :length], compact=positions == "compact")
        assert_close(logits, wanted)


@torch.no_grad()
def test_a_later_image_under_other_positions(model, one):
    """Kept positions after renumbered ones: its own gaps stay, and those before it stay closed."""
    first, second = Schedule(PRE, positions="compact"), Schedule([Stage(0, 7, Uniform())])
    more = prompt(model, [[8, "image", 9, 11]])
    with first(model) as pruning:
        cache = model(**one, use_cache=True).past_key_values
        gone = [gone_from(one, pruning, first)]
    with second(model) as pruning:
        ours = model(input_ids=more["input_ids"], pixel_values=more["pixel_values"], past_key_values=cache).logits[
            :, -1
        ]
        gone.append(gone_from(more, pruning, second))
    ids, pixels = (torch.cat([turn[name] for turn in (one, more)], axis)
                   for name, axis in (("input_ids", 1), ("pixel_values", 0)))  # fmt: skip
    places = torch.cat([gone[0] == LATE, torch.ones_like(gone[1], dtype=torch.bool)], 1).long().cumsum(1) - 1
    gone = torch.cat(gone, 1)
    assert_close(
        ours, reference.logits(model, reference.merged(model, ids, pixels), torch.ones_like(gone), gone, places)
    )


@torch.no_grad()
@pytest.mark.parametrize("schedule", [Schedule(PRE), DEEP, Schedule([Stage(0, 0.5, Random()), Stage(2, 4, FastV())])])
def test_what_the_mask_hides_of_an_earlier_answer_stays_hidden(model, schedule):
    """In a batch, answers end at different tokens: what follows an end is masked in the next turn."""
    inputs, turn = prompt(model, RAGGED), torch.tensor([[21, 22, 23]] * 3)
    with schedule(model) as pruning:
        said = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([said.sequences, turn], 1)
        valid = torch.cat([inputs["attention_mask"], torch.ones(3, 8, dtype=torch.long)], 1)
        for row, length in enumerate([2, 5, 1]):
            valid[row, inputs["input_ids"].shape[1] + length : -3] = 0
        out = model.generate(
            input_ids=ids, attention_mask=valid, past_key_values=said.past_key_values, max_new_tokens=3,
            do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    more = ids[:, inputs["input_ids"].shape[1] :]
    for logits in out.logits:
        assert_close(logits, expected(model, inputs, pruning, schedule, more, valid))
        more = torch.cat([more, logits.argmax(-1, keepdim=True)], 1)
        valid = torch.cat([valid, torch.ones_like(more[:, :1])], 1)


def crop(model, cache):
    cache.crop(-10)


def outside(model, cache):
    model(input_ids=TURN, past_key_values=cache)


def interrupted(model, cache):
    def stop(*_):
        raise CodebookError("inside")

    handle = model.get_decoder().layers[2].register_forward_pre_hook(stop)
    try:
        with DEEP(model):
            model(input_ids=TURN, past_key_values=cache)
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("broken", [crop, outside, interrupted])
def test_a_cache_on_which_something_broke_off_is_refused(model, one, broken):
    """Its first layers have gone on, the others have not."""
    with DEEP(model):
        cache = model(**one, use_cache=True).past_key_values
    with pytest.raises(CodebookError, match=r"reach back|inside"):
        broken(model, cache)
    before = [layer.keys.shape for layer in cache.layers]
    with DEEP(model), pytest.raises(CodebookError, match=r"hold (31 or 41|41 or 45) tokens: .*; read the prompt anew$"):
        model(input_ids=TURN, past_key_values=cache)
    assert [layer.keys.shape for layer in cache.layers] == before


@torch.no_grad()
def test_masks_of_another_length_are_refused(model, one):
    """Those of the turn alone, in a later turn, and those that are too long."""
    length = one["input_ids"].shape[1]
    for schedule in (Schedule(PRE), DEEP):
        with schedule(model):
            cache = model(**one, use_cache=True).past_key_values
            before = [layer.keys.shape for layer in cache.layers]
            for wrong in (4, length, length + 5):
                with pytest.raises(CodebookError, match=f"for {wrong} tokens, .* there are {length + 4}: give"):
                    model(input_ids=TURN, past_key_values=cache, attention_mask=torch.ones(1, wrong))
            assert [layer.keys.shape for layer in cache.layers] == before
            with pytest.raises(CodebookError, match=f"for {length + 1} tokens"):
                model(**one | {"attention_mask": torch.ones(1, length + 1)})
