"""Every method keeps the same tokens on a GPU as on the CPU, and in half precision as in float32 on equal values."""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch

from codebook import Codebook, VisualTokens
from codebook.pruning import METHODS
from codebook.pruning.attention import Attention, Vision
from tests.cuda.device import CUDA, DEVICE, moved
from tests.pruning import stages

pytestmark = CUDA
N, TEXT, WIDTH, HEADS, KEEP = 144, 9, 64, 4, 36
NAMES = [name for name in METHODS if name != "drop"]


@functools.cache
def book():
    return Codebook(torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(1)))


def tokens(device, dtype=torch.float32, rounded=torch.float32):
    """A random image with text behind it. Its values were once in `rounded`; those of the attention stay in float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    sequence = draw(N + TEXT, WIDTH).to(rounded).to(dtype).to(device)
    side, span = math.isqrt(N), slice(0, N)
    query, key = (draw(HEADS, N + TEXT, WIDTH // HEADS).to(device) for _ in range(2))
    angles = draw(N + TEXT, WIDTH // HEADS).to(device)
    attention = Attention(query, key, angles.cos(), angles.sin(), 0.25, span)
    vision = Vision(draw(HEADS, N + 1, 16).to(device), draw(HEADS, N + 1, 16).to(device), 0.25, has_cls=True)
    return VisualTokens(
        sequence[span], sequence[span], sequence, span, torch.arange(N, N + TEXT, device=device),
        torch.arange(N, device=device), (side, side), torch.tensor(7, device=device), attention, vision,
        lambda r, c: sequence[: r * c],
    )  # fmt: skip


def pruner(name):
    method = METHODS[name]
    made = method(book()) if method.needs_codebook else method()
    return replace(made, threshold=0.3) if made.adaptive else made


def choose(name, given):
    own = pruner(name)
    index = own.choose(given) if own.adaptive else own.select(given, KEEP)
    return index, own.merge(given, index)


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
@pytest.mark.parametrize("name", METHODS)
def test_models_keep_what_they_keep_on_the_cpu(name, tower):
    for attention in stages.ATTENTIONS:
        schedule = stages.schedule(name, tower)
        with schedule(stages.MODELS[tower, attention]) as pruning:
            stages.MODELS[tower, attention](**stages.BATCH)
        with schedule(model(tower, attention)) as ours:
            model(tower, attention)(**moved(stages.BATCH))
        assert [[x.tolist() for x in kept] for kept in ours.kept] == [[x.tolist() for x in k] for k in pruning.kept]
