"""Half precision: pruned logits stay as near to float32's as the unpruned model's own do."""

import contextlib
import copy
import functools
import statistics

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from codebook.pruning import Schedule, SeededFarthestPoint, Stage, Uniform
from codebook.store.codebook import Codebook
from tests.cuda.device import CUDA, DEVICE, moved
from tests.models.cells import ROWS, model
from tests.models.families import FAMILIES
from tests.prompts import ONE, prompt
from tests.tiny import llava

pytestmark = CUDA
BOUNDS = {torch.bfloat16: 0.12, torch.float16: 0.03}
"""The largest root mean square of the logits' differences from float32's, as a part of that of the logits."""


@functools.cache
def rounded(name, dtype):
    return copy.deepcopy(model(name, "sdpa", DEVICE)).to(dtype)


def error(ours, exact):
    assert ours.isfinite().all()
    return float((ours - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def drawn(name, seed, dtype=torch.float32):
    """A family's prompts with random pixels."""
    inputs = FAMILIES[name].inputs(ROWS["several"])
    generator = torch.Generator().manual_seed(seed)
    pixels = {k: torch.randn(v.shape, generator=generator) for k, v in inputs.items() if v.is_floating_point()}
    return moved(inputs | pixels, dtype)


def repeat(said, own):
    """What a router said, the last of `said`, in the dtypes of its `own`."""
    return tuple(there.to(here) for there, here in zip(said.pop(), own, strict=True))


@contextlib.contextmanager
def routers(model, answer):
    """A context in which `answer` may replace what each router says of its tokens: logits, weights, experts."""
    found = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    hooks = [module.register_forward_hook(lambda _module, _args, said: answer(said)) for module in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_logits_are_near_those_of_float32(name, dtype):
    """What is kept does not go by values, so that both keep the same tokens. Both ask the same experts: of two that
    are nearly equal rounding may prefer the other, whose answer is far away. The median of three images, since a model
    of random weights makes much of some roundings, pruned or not."""
    half, exact = rounded(name, dtype), model(name, "sdpa", DEVICE)
    errors = []
    for stages in [], [Stage(0, 0.5, Uniform()), Stage(2, 0.25, Uniform())]:
        found = []
        for seed in range(3):
            said = []
            with Schedule(stages)(exact), routers(exact, said.append):
                expected = exact(**drawn(name, seed)).logits[:, -1]
            said.reverse()
            with Schedule(stages)(half), routers(half, functools.partial(repeat, said)):
                ours = half(**drawn(name, seed, dtype)).logits[:, -1].float()
            assert not said
            found.append(error(ours, expected))
        errors.append(statistics.median(found))
    unpruned, pruned = errors
    assert pruned <= min(BOUNDS[dtype], 4 * unpruned)


@torch.no_grad()
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_mass_in_half_precision(dtype):
    """The image's features are given, rounded once, so that both count the same tokens to the same kept ones."""
    exact = llava().to(DEVICE)
    half = copy.deepcopy(exact).to(dtype)
    inputs = moved(prompt(exact, ONE))
    features = exact.get_image_features(pixel_values=inputs.pop("pixel_values"), return_dict=True).pooler_output[0]
    features = features.to(dtype)
    book = Codebook(torch.randn(7, 48, generator=torch.Generator().manual_seed(5)))
    schedule = Schedule([Stage(0, 0.25, SeededFarthestPoint(book), mass=True)])
    logits, kept = [], []
    for target, values in ((half, features), (exact, features.float())):
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=[values])}
        with schedule(target) as pruning:
            logits.append(target(**inputs, mm_encoder_outputs=encoded).logits[:, -1].float())
        kept.append(pruning.kept[0][0])
    # Random selection would go by the features' bits; this one by their values.
    assert torch.equal(*kept) and len(kept[0]) == 9
    assert error(*logits) <= BOUNDS[dtype]
