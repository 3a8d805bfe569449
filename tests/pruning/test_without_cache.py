"""A generation without a KV cache, or with guesses in its first forward, keeps what its prompt alone would keep."""

import pytest
import torch

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
