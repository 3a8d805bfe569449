"""Every method keeps the same tokens on a GPU as on the CPU, and in half precision as in float32 on equal values."""

import copy
import functools

import pytest
import torch

from tests.cuda.choices import NAMES, N, choose, tokens
from tests.cuda.device import CUDA, DEVICE, moved
from tests.pruning import stages

pytestmark = CUDA


@pytest.mark.parametrize("name", NAMES)
def test_selections_equal_the_cpus(name):
    index, values = choose(name, tokens(DEVICE))
    expected, theirs = choose(name, tokens("cpu"))
    assert index.device.type == DEVICE and torch.equal(index.cpu(), expected)
    assert 0 < len(index) < N
    assert (values is None) == (theirs is None)
    if values is not None:
        assert torch.allclose(values.cpu(), theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_chooses_as_float32_on_the_same_values(name, dtype):
    index, _ = choose(name, tokens(DEVICE, dtype, dtype))
    expected, _ = choose(name, tokens("cpu", torch.float32, dtype))
    assert torch.equal(index.cpu(), expected)


@functools.cache
def model(tower, attention):
    """The CPU's model, copied: `to` would move that one itself."""
    return copy.deepcopy(stages.MODELS[tower, attention]).to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("tower", stages.TOWERS)
@pytest.mark.parametrize("name", stages.SINGLE)
def test_models_keep_what_they_keep_on_the_cpu(name, tower):
    for attention in stages.ATTENTIONS:
        schedule = stages.schedule(name, tower)
        with schedule(stages.MODELS[tower, attention]) as pruning:
            stages.MODELS[tower, attention](**stages.BATCH)
        with schedule(model(tower, attention)) as ours:
            model(tower, attention)(**moved(stages.BATCH))
        assert [[x.tolist() for x in kept] for kept in ours.kept] == [[x.tolist() for x in k] for k in pruning.kept]
