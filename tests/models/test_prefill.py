"""A shared prefill, continued in many ways, against masking in the stock model; or refused with a reason."""

import pytest
import torch

from codebook.analysis.prefill import Prefill
from codebook.errors import CodebookError
from tests import reference
from tests.models.cells import ROWS, model
from tests.models.families import FAMILIES

UNLIKE = (
    "gemma3",
    "gemma4",
    "gemma4_e2b",
    "gemma4_unified",
    "paligemma",
    "aya_vision",
    "cohere2_vision",
    "qwen3_5",
    "qwen3_5_moe",
    "lfm2_vl",
    "llama4",
    "lfm3_vl",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "molmo2",
)
REFUSED = dict.fromkeys(UNLIKE, "--metric generated") | dict.fromkeys(
    ("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker", "cosmos3_omni", "granite4_vision"), "deepstack"
)


@pytest.fixture(params=FAMILIES)
def tiny(request):
    return FAMILIES[request.param]


@torch.no_grad()
@pytest.mark.parametrize("show", ["image", "video"])
def test_variants_equal_masking(tiny, show):
    if show == "video" and not tiny.videos:
        pytest.skip("the family has no videos")
    rows = ROWS[show][:1]
    inputs, target = tiny.inputs(rows), model(tiny.name, "sdpa")
    if reason := REFUSED.get(tiny.name):
        with pytest.raises(CodebookError, match=reason):
            Prefill.of(target, inputs)
        return
    prefill = Prefill.of(target, inputs)
    columns = torch.cat([places for _, _, places in tiny.columns(rows)])
    assert torch.equal(prefill.visual, columns)
    kept = torch.rand(4, len(columns), generator=torch.Generator().manual_seed(0)) < 0.5
    kept[0] = False
    layers = [0, 1, 2, 3]
    ours = prefill.answers(layers, kept)
    for layer, keep, logits in zip(layers, kept, ours, strict=True):
        gone = torch.full(inputs["input_ids"].shape, 10**6)
        gone[0, columns[~keep]] = layer
        theirs = reference.masked(target, inputs, gone)[1][0, 0]
        assert (logits - theirs).abs().max() <= 1e-5 * theirs.abs().max()
