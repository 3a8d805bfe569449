"""Pruned generation on a GPU equals the masked reference, which has no cache and runs on the CPU."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from codebook.pruning import DivPrune, FastV, Random, Schedule, Stage
from tests.cuda.device import CUDA, DEVICE, moved
from tests.models.cells import Cell, check, expected
from tests.models.families import FAMILIES
from tests.prompts import ONE, RAGGED, prompt
from tests.tiny import llava

pytestmark = CUDA
ROUNDING = 1e-4  # of the largest logit: float32 on two kinds of hardware
CELLS = [
    ("features", "sdpa", "padded", "several", "keep"),
    ("mass", "sdpa", "padded", "several", "keep"),
    ("attention", "eager", "padded", "image", "compact"),
    ("tower", "sdpa", "padded", "video", "keep"),
]


@pytest.mark.parametrize("dimensions", CELLS, ids="-".join)
@pytest.mark.parametrize("name", FAMILIES)
def test_generate_equals_masked_reference(name, dimensions):
    cell = Cell(name, *dimensions)
    assert check(cell, DEVICE, ROUNDING) == expected(cell)


# Prompts of more than 128 tokens, a block of the compiled kernel, before and behind a stage, and short ones to decode.
@pytest.mark.skipif(DEVICE != "cuda", reason="compiled for CPUs, FlexAttention ends the process")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize("method", ["mass", "attention"])
@pytest.mark.parametrize("name", ["llava_next", "gemma3"])
def test_compiled_flex_attention_equals_masked_reference(name, method):
    assert check(Cell(name, method, "flex_attention", "padded", "many", "keep"), DEVICE, ROUNDING) == "works"


def test_two_threads_with_schedules_of_their_own():
    target = llava().to(DEVICE)
    prompts = [moved(prompt(target, rows)) for rows in (ONE, RAGGED)]
    schedules = [
        Schedule([Stage(0, 0.3, Random()), Stage(2, 3, Random())]),
        Schedule([Stage(0, 0.5, DivPrune(), mass=True), Stage(2, 4, FastV())]),
    ]

    def generated(i, j):
        with torch.no_grad(), schedules[i](target, "thread"):
            return target.generate(**prompts[j], max_new_tokens=4, do_sample=False)

    alone = {(i, j): generated(i, j) for i in range(2) for j in range(2)}
    assert any(not torch.equal(alone[0, j], alone[1, j]) for j in range(2))
    ready = threading.Barrier(2)

    def work(i):
        ready.wait()
        return all(torch.equal(generated(i, j % 2), alone[i, j % 2]) for j in range(10))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [True, True]
