"""Prompts that take turns on one model: each goes on as if it were alone."""

import copy

import pytest
import torch

from codebook.pruning import Random, Schedule, Stage, Uniform
from tests.models.cells import model
from tests.models.families import FAMILIES

NAMES = ["qwen2_vl", "qwen3_5", "glm4v", "qwen2_5_omni_thinker", "minicpmv4_7", "llava"]
"""Models that keep on themselves how far the last prompt's positions are from its columns, and one that does not."""
SCHEDULES = [Schedule([Stage(0, 0.5, Random()), Stage(2, 0.25, Uniform())]), Schedule([])]
FIRST, OTHER = [[5, "image", 7, 8]], [[5, 6, 7, "large", 9, 10, "image", 8]]


class Between:
    """A logits processor that has another prompt answered at a generation's first step."""

    def __init__(self, ask):
        self.ask = ask

    def __call__(self, ids, scores):
        ask, self.ask = self.ask, lambda: None
        ask()
        return scores


def text(target):
    target.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_generations(name, schedule):
    tiny, target = FAMILIES[name], model(name, "sdpa")
    length = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def image():
        target.generate(**tiny.inputs(OTHER), max_new_tokens=2, do_sample=False)

    def second(between, within):
        first = target.generate(**tiny.inputs(FIRST), **length, logits_processor=[Between(within)])
        between()
        ids = torch.cat([first.sequences, torch.tensor([[11, 12]])], 1)
        return torch.stack(target.generate(input_ids=ids, past_key_values=first.past_key_values, **length).logits)

    with schedule(target):
        alone = second(lambda: None, lambda: None)
        for between in (image, lambda: text(target)):
            assert torch.equal(second(between, lambda: None), alone)
            assert torch.equal(second(lambda: None, between), alone)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", ["qwen2_vl", "glm4v", "qwen2_5_omni_thinker", "llava"])  # others cannot take rows
def test_rows_of_a_cache(name, schedule):
    """In another order, without some, or each twice."""
    tiny, target = FAMILIES[name], model(name, "sdpa")
    inputs = tiny.inputs([["image", 5, 6, 7], [3, "large", 5, 6]])
    length = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ways = [
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: None, [0, 1]),
    ]
    with schedule(target):
        first = target.generate(**inputs, **length)
        ids = torch.cat([first.sequences, torch.tensor([[11, 12]] * 2)], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)

        def second(change, rows):
            change(cache := copy.deepcopy(first.past_key_values))
            given = {"input_ids": ids[rows], "attention_mask": mask[rows], "past_key_values": cache}
            return torch.stack(target.generate(**given, **length).logits, 1)

        whole = second(*ways.pop())
        for change, rows in ways:
            torch.testing.assert_close(second(change, rows), whole[rows], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_loops_by_hand(name):
    """Also of a text behind an image, which has no deltas of its own."""
    tiny, target = FAMILIES[name], model(name, "sdpa")
    prompts = [tiny.inputs(rows) for rows in (FIRST, OTHER)] + [{"input_ids": torch.tensor([[5, 6, 7, 8]])}]

    def loop(inputs):
        out = target(**inputs, use_cache=True)
        for word in (11, 12, 13):
            yield out.logits[:, -1]
            out = target(input_ids=torch.tensor([[word]]), past_key_values=out.past_key_values)
        yield out.logits[:, -1]

    with SCHEDULES[0](target):
        alone = []
        for inputs in reversed(prompts):
            if hasattr(target.base_model, "rope_deltas"):
                target.base_model.rope_deltas = None  # as in a new model
            alone.insert(0, [*loop(inputs)])
        steps = zip(*map(loop, prompts), strict=True)
        for step, expected in zip(steps, zip(*alone, strict=True), strict=True):
            assert all(map(torch.equal, step, expected))
