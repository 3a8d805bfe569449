"""Numbers per key on a GPU: folded into the heads, and as a mask, against the formula in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward as stock

from codebook.pruning.engine import key_bias
from codebook.pruning.engine.key_bias import FOLD_FROM, KeyBias, attend, best_way
from tests.cuda.device import CUDA, DEVICE
from tests.models.cells import Cell, check
from tests.models.families import FAMILIES

pytestmark = CUDA
LOW = torch.finfo(torch.float32).min
SCALING = 64**-0.5


def given(dtype, n):
    """Queries, keys, values (two rows, four heads, two of keys, 64 wide), and numbers; the second row is padded."""
    generator = torch.Generator().manual_seed(n)
    query = torch.randn(2, 4, n, 64, generator=generator).to(DEVICE, dtype)
    key, value = torch.randn(2, 2, 2, n, 64, generator=generator).to(DEVICE, dtype)
    row = torch.randint(1, 577, (2, n), generator=generator).float().log()
    row[1, : n // 3] = LOW
    return query, key, value, row.to(DEVICE)


def error(out, query, key, value, row):
    key, value = (x.double().repeat_interleave(2, 1) for x in (key, value))
    logits = query.double() @ key.transpose(-1, -2) * SCALING + row.double()[:, None, None]
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    expected = (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)
    assert out.isfinite().all()
    return float((out.double() - expected).abs().masked_fill((row == LOW)[..., None, None], 0).max())


# Half precision: what rounding an output of up to 4 gives, and for a mask the numbers, which it rounds.
@torch.no_grad()
@pytest.mark.parametrize("n", [100, FOLD_FROM])
@pytest.mark.parametrize(
    "dtype,bounds",
    [(torch.float32, {"fold": 1e-5, "mask": 1e-5}), (torch.bfloat16, {"fold": 0.016, "mask": 0.06}),
     (torch.float16, {"fold": 0.003, "mask": 0.008})],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("way", ["fold", "mask"])
def test_the_formula_in_float64(monkeypatch, dtype, bounds, way, n):
    monkeypatch.setattr(key_bias, "best_way", lambda *_: way)
    *heads, row = given(dtype, n)
    out, _ = attend(stock, SimpleNamespace(num_key_value_groups=2), *heads, KeyBias(row), scaling=SCALING)
    assert error(out, *heads, row) <= bounds[way]


@torch.no_grad()
@pytest.mark.skipif(DEVICE != "cuda", reason="of flash kernels there")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_folded_heads_run_in_flash_kernels(dtype):
    """With no other kernel allowed, at the length from which folding is used."""
    *heads, row = given(dtype, FOLD_FROM)
    assert best_way(*heads) == "fold"
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        out, _ = attend(stock, SimpleNamespace(num_key_value_groups=2), *heads, KeyBias(row), scaling=SCALING)
    assert error(out, *heads, row) <= 0.016


@pytest.mark.parametrize("name", FAMILIES)
def test_folded_generation_equals_masked_reference(monkeypatch, name):
    monkeypatch.setattr(key_bias, "best_way", lambda *_: "fold")
    assert check(Cell(name, "mass", "sdpa", "padded", "several", "keep"), DEVICE, 1e-4) == "works"
