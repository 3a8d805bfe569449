"""Calls that run a model in other ways than by calling it: pruned as ever, or refused by name."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from codebook.errors import CodebookError
from codebook.pruning import FastV, Random, Schedule, Stage
from tests.prompts import ONE, assert_close, prompt
from tests.tiny import llava

SCHEDULE = Schedule([Stage(0, 0.5, Random(), mass=True), Stage(2, 4, FastV())])
MODEL = llava()
INPUTS = prompt(MODEL, ONE)
IDS, PIXELS = INPUTS["input_ids"], INPUTS["pixel_values"]


class Asked(nn.Module):
    """The model's logits, from tensors alone."""

    def __init__(self):
        super().__init__()
        self.model = MODEL

    def forward(self, pixels):
        return self.model(input_ids=IDS, pixel_values=pixels, use_cache=False).logits


ASKED = Asked()
RECORDED = {
    "trace": lambda: torch.jit.trace(ASKED, (PIXELS,)),
    "export": lambda: torch.export.export(ASKED, (PIXELS,), strict=False),
    "vmap": lambda: torch.vmap(ASKED)(torch.stack([PIXELS, -PIXELS])),
    "vmap of gradients": lambda: torch.vmap(torch.func.grad(lambda x: ASKED(x).sum()))(PIXELS[None]),
    "vmap of text": lambda: torch.vmap(lambda ids: MODEL(input_ids=ids).logits)(torch.tensor([[[5, 6]], [[7, 8]]])),
}


@torch.no_grad()
@pytest.mark.parametrize("how", RECORDED)
def test_graphs_and_maps_are_refused(how):
    """What one picture keeps would be part of the graph, for all others."""
    what = "mapped over a batch by torch.vmap" if "vmap" in how else "traced or exported"
    with SCHEDULE(MODEL):
        expected = ASKED(PIXELS)
        with pytest.raises(CodebookError, match=f"^a model inside a pruning context cannot be {what}, .*: [^\n]*$"):
            RECORDED[how]()
        assert torch.equal(ASKED(PIXELS), expected)


def test_functional_calls_are_pruned():
    """Other weights for one call, gradients as a function, and layers that run again in the backward pass."""
    weights = {name: weight * 1.1 for name, weight in MODEL.state_dict().items()}
    other = llava()
    other.load_state_dict(weights)
    pixels = PIXELS.clone().requires_grad_()
    with SCHEDULE(MODEL), SCHEDULE(other):
        expected = other(**INPUTS).logits
        found = torch.func.functional_call(MODEL, weights, kwargs=dict(INPUTS)).logits
        assert_close(found, expected)
        [gradient] = torch.autograd.grad(ASKED(pixels).sum(), pixels)
        [again] = torch.autograd.grad(checkpoint(ASKED, pixels, use_reentrant=False).sum(), pixels)
        assert_close(torch.func.grad(lambda x: ASKED(x).sum())(PIXELS), gradient)
    assert torch.equal(again, gradient)


LM = MODEL.model.language_model
PAST = {
    "the decoder's forward": lambda embeds, rotary: LM.forward(inputs_embeds=embeds),
    "the decoder's forward, of text": lambda embeds, rotary: LM.forward(input_ids=IDS),
    "a layer": lambda embeds, rotary: LM.layers[0](embeds, position_embeddings=rotary),
}


@torch.no_grad()
@pytest.mark.parametrize("how", PAST)
def test_layers_run_past_the_decoders_hooks_are_refused(how):
    """They would run unpruned. In a thread that nobody prunes they do."""
    embeds = MODEL.get_input_embeddings()(IDS)
    given = embeds, LM.rotary_emb(embeds, torch.arange(IDS.shape[1])[None])
    with SCHEDULE(MODEL):
        expected = ASKED(PIXELS)
        with pytest.raises(CodebookError, match=r"^layer 0 .* past the decoder's hooks, .*: call the Llava\w+ itself$"):
            PAST[how](*given)
        assert torch.equal(ASKED(PIXELS), expected)
    with SCHEDULE(MODEL, "thread"), ThreadPoolExecutor(1) as other:
        other.submit(PAST[how], *given).result()
