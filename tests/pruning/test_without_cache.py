"""A generation without a KV cache, or with guesses in its first forward, keeps what its prompt alone would keep."""

import pytest
import torch

from codebook.pruning import Merged, Pruner, Schedule, Stage
from tests.prompts import ONE, RAGGED, prompt
from tests.pruning.stages import SINGLE, schedule
from tests.tiny import llava


@torch.no_grad()
@pytest.mark.parametrize("name", sorted({*SINGLE} - {"drop"}))
def test_equals_the_cached_generation(name):
    model = llava()
    for rows in (ONE, RAGGED):
        inputs = prompt(model, rows)
        # The stock model without a cache takes an image token that it has generated for one of the prompt's.
        options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
        with schedule(name, "clip")(model) as pruning:
            cached = model.generate(**inputs, **options)
            expected = pruning.kept
            plain = model.generate(**inputs, **options, use_cache=False)
            assert torch.equal(plain, cached)
            assert all(map(torch.equal, [k[-1] for k in pruning.kept], [k[-1] for k in expected]))


@torch.no_grad()
def test_what_is_merged_is_chosen_once():
    """Where rounding, in later forwards, would have other tokens chosen, groups stay those of the first."""

    class Wavering(Pruner):
        def select(self, tokens, keep):
            asked.append(keep)
            return torch.arange(keep) + 7 * len(asked) % 20

    model, asked = llava(), []
    inputs, whole = prompt(model, ONE), Schedule([Stage(2, 5, Merged(Wavering()), "distance")])
    options = {"max_new_tokens": 4, "suppress_tokens": [model.config.image_token_id], "do_sample": False}
    logits = []
    for cached in (True, False):
        asked.clear()
        with whole(model):
            out = model.generate(
                **inputs, **options, use_cache=cached, return_dict_in_generate=True, output_logits=True
            )
        logits.append(torch.stack(out.logits))
        assert asked == [5]
    assert torch.allclose(*logits, atol=1e-4)
