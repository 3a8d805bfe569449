"""Calls of the model that a generation makes on its way: each is pruned as it would be alone, and changes no other."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from codebook.pruning import FastV, Random, Schedule, Stage
from tests import reference
from tests.prompts import ONE, assert_close, gone_from, prompt
from tests.tiny import IMAGE, llava

SCHEDULE = Schedule([Stage(0, 0.5, Random()), Stage(2, 4, FastV())])
MODEL = llava()
INPUTS = prompt(MODEL, ONE)
OTHERS = {
    "other pixels": {**INPUTS, "pixel_values": -INPUTS["pixel_values"]},  # contrastive decoding, arXiv 2311.16922
    "a longer prompt": prompt(MODEL, [[3, "image", 4, *range(5, 15)]]),
    "a shorter prompt": prompt(MODEL, [["image", 5]]),
}


class Asks(LogitsProcessor):
    """At every step calls the model with another prompt, and leaves the scores as they are."""

    def __init__(self, ask):
        self.ask, self.answers = ask, []

    def __call__(self, input_ids, scores):
        self.answers.append(self.ask())
        return scores


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_forwards(name, use_cache):
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE], "use_cache": use_cache}
    with SCHEDULE(MODEL) as pruning:
        asks = Asks(lambda: (MODEL(**OTHERS[name]).logits[:, -1], gone_from(OTHERS[name], pruning, SCHEDULE)))
        MODEL.generate(**INPUTS, **options)
        gone = gone_from(INPUTS, pruning, SCHEDULE)
        tokens = MODEL.generate(**INPUTS, **options, logits_processor=LogitsProcessorList([asks]))
        assert pruning.statistics.forwards == 6  # two generations, and four forwards in one of them
    with SCHEDULE(MODEL) as alone:
        MODEL(**OTHERS[name])
    other = gone_from(OTHERS[name], alone, SCHEDULE)
    said = tokens[:, INPUTS["input_ids"].shape[1] :]
    assert torch.equal(said, reference.masked(MODEL, INPUTS, gone, said, suppress=[IMAGE])[0])
    _, logits = reference.masked(MODEL, OTHERS[name], other)
    for answer, kept in asks.answers:
        assert torch.equal(kept, other)
        assert_close(answer, logits[:, 0])


@torch.no_grad()
def test_generations():
    """With and without a cache, whatever the prompt around them."""
    other = OTHERS["a longer prompt"]
    options = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [IMAGE]}
    with SCHEDULE(MODEL) as pruning:
        expected = MODEL.generate(**other, **options)
        kept, plain = gone_from(other, pruning, SCHEDULE), MODEL.generate(**INPUTS, **options)
        for use_cache in (True, False):
            asks = Asks(
                lambda use_cache=use_cache: (
                    MODEL.generate(**other, **options, use_cache=use_cache),
                    gone_from(other, pruning, SCHEDULE),
                )
            )
            tokens = MODEL.generate(
                **INPUTS, **options, use_cache=not use_cache, logits_processor=LogitsProcessorList([asks])
            )
            assert torch.equal(tokens, plain)
            assert all(torch.equal(answer, expected) and torch.equal(own, kept) for answer, own in asks.answers)
    said = expected[:, other["input_ids"].shape[1] :]
    assert torch.equal(said, reference.masked(MODEL, other, kept, said, suppress=[IMAGE])[0])


@torch.no_grad()
def test_the_model_as_its_own_assistant():
    """Stock `generate` shows an assistant no images, and its image tokens are text."""
    seen = []
    with SCHEDULE(MODEL) as pruning:
        layer = MODEL.get_decoder().layers[-1]
        hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        tokens = MODEL.generate(
            **INPUTS, max_new_tokens=8, do_sample=False, suppress_tokens=[IMAGE], assistant_model=MODEL
        )
        hook.remove()
    length = INPUTS["input_ids"].shape[1]
    said = tokens[:, length:]
    expected, _ = reference.masked(MODEL, INPUTS, gone_from(INPUTS, pruning, SCHEDULE), said, suppress=[IMAGE])
    assert torch.equal(said, expected)
    assert seen[0] == length and seen[1] < length  # the assistant's prompt is whole, the model's is pruned
