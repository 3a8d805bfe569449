"""Memory of the device: contexts that have come and gone leave none behind."""

import gc

import torch

from codebook.pruning import FastV, Random, Schedule, Stage
from tests.cuda.device import CUDA, DEVICE, moved
from tests.prompts import RAGGED, prompt
from tests.tiny import llava

pytestmark = CUDA


def allocated():
    gc.collect()
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


@torch.inference_mode()
def test_a_hundred_contexts_leave_nothing_behind():
    target = llava().to(DEVICE)
    inputs = moved(prompt(target, RAGGED))
    schedule = Schedule([Stage(0, 0.5, Random(), mass=True), Stage(2, 4, FastV())])

    def ask():
        with schedule(target) as pruning:
            target.generate(**inputs, max_new_tokens=2, do_sample=False)
        return pruning.kept

    assert ask()
    before = allocated()
    for _ in range(100):
        ask()
    assert allocated() == before


@torch.inference_mode()
def test_a_shorter_cache_takes_less_memory():
    target = llava().to(DEVICE)
    inputs = moved(prompt(target, RAGGED))

    def held(schedule):
        before = allocated()
        with schedule(target):
            cache = target(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        used = allocated() - before
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        return used

    held(Schedule([Stage(0, 0.5, Random())]))  # kernels and what is made once
    full, half = held(Schedule([])), held(Schedule([Stage(0, 0.1, Random())]))
    assert half < 0.5 * full or DEVICE == "cpu"
