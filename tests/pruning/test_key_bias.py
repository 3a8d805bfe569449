"""Numbers added to attention's logits: each way against the formula in float64, and against a mask in every family."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward as stock

from codebook.errors import CodebookError
from codebook.pruning import Random, Schedule, Stage
from codebook.pruning.engine import hooks, key_bias
from codebook.pruning.engine.key_bias import FOLD_FROM, KeyBias, attend, best_way
from tests.models.cells import model
from tests.models.families import FAMILIES
from tests.prompts import ONE, RAGGED, prompt
from tests.tiny import llava

LOW = torch.finfo(torch.float32).min
BLOCKS = ("gemma3", "gemma4_unified", "paligemma", "molmo2")
"""Families whose images see themselves in both directions in every layer, so that no layer is causal."""
WAYS = {"kimi_k25": ("mask", "fold")}
"""Its values have another width than its keys, which torch's CPU kernel does not take."""
SCHEDULE = Schedule([Stage(0, 0.5, Random(), mass=True), Stage(2, 0.25, Random(), mass=True)])


def force(monkeypatch, way):
    monkeypatch.setattr(key_bias, "best_way", lambda *_: way)


def given(dtype, width, heads=4, groups=2, n=33, padding=5):
    """Queries, keys, values and numbers of two rows, the second padded on the left."""
    generator = torch.Generator().manual_seed(width)
    query = torch.randn(2, heads, n, width, generator=generator).to(dtype)
    key, value = torch.randn(2, 2, heads // groups, n, width, generator=generator).to(dtype)
    row = torch.randint(1, 577, (2, n), generator=generator).float().log()
    row[1, :padding] = LOW
    return query, key, value, row


def formula(query, key, value, row, scaling):
    """(B, K, heads, d) float64, one query after the other; zeros for queries that are padding."""
    batch, heads, n, width = query.shape
    out = torch.zeros(batch, n, heads, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            k, v = (x[b, h * x.shape[1] // heads].double() for x in (key, value))
            for i in range(n):
                seen = [j for j in range(i + 1) if row[b, j] > LOW]
                if seen and row[b, i] > LOW:
                    logits = k[seen] @ query[b, h, i].double() * scaling + row[b, seen].double()
                    out[b, i, h] = logits.softmax(0) @ v[seen]
    return out


def error(out, expected, row):
    difference = (out.double() - expected).abs()
    assert out.isfinite().all()  # rows that are padding too: what they give enters the layers behind
    return float(difference.masked_fill((row == LOW)[..., None, None], 0).max())


@torch.no_grad()
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 3e-6), (torch.bfloat16, 0.012), (torch.float16, 0.0016)])
@pytest.mark.parametrize("width,scaling", [(16, 16**-0.5), (64, 0.2), (12, 1.0)])
@pytest.mark.parametrize("way", ["row", "fold"])
def test_the_formula_in_float64(monkeypatch, dtype, bound, width, scaling, way):
    """Half precision: bounds of a rounded output of 3; numbers rounded to bfloat16 alone give 0.02 and more."""
    force(monkeypatch, way)
    *heads, row = given(dtype, width)
    out, maps = attend(stock, SimpleNamespace(num_key_value_groups=2), *heads, KeyBias(row), scaling=scaling)
    assert maps is None and out.dtype == dtype
    assert error(out, formula(*heads, row, scaling), row) <= bound


def test_folded_numbers_are_whole():
    """The three parts sum to b / scaling: to 24 bits in bfloat16 and float16, of which one part has 8 and 11."""
    row, scaling = torch.arange(1, 577).float().log()[None], 128**-0.5
    exact = row.double() / scaling
    for dtype in torch.bfloat16, torch.float16:
        folded = KeyBias(row).folded(scaling, dtype)[:, 0]
        assert folded.dtype == dtype and folded.shape == (1, 576, 8) and not folded[..., 3:].any()
        whole, first = (x.double() for x in (folded.double().sum(-1), folded[..., 0]))
        assert (whole - exact).abs().max() <= 2.0**-23 * exact.max()
        assert (first - exact).abs().max() > 2.0**-13 * exact.max()
    low = KeyBias(torch.full((1, 1), LOW)).folded(scaling, torch.float16)
    assert low.isfinite().all() and low.double().sum() * scaling < -1000


def apart(x):
    """The same numbers, with those of a head not side by side."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@torch.no_grad()
@pytest.mark.parametrize("dtype,laid", [(torch.float64, torch.clone), (torch.float32, apart)])
def test_what_the_cpu_kernel_would_misread(dtype, laid):
    """A row in float32 beside queries in float64, and heads whose entries are apart."""
    *heads, row = given(dtype, 16)
    heads = [laid(x) for x in heads]
    out, _ = attend(stock, SimpleNamespace(num_key_value_groups=2), *heads, KeyBias(row), scaling=0.25)
    assert out.dtype == dtype and error(out, formula(*heads, row, 0.25), row) <= 3e-6


@pytest.mark.parametrize("shares", [True, False])
def test_whether_the_kernel_shares_keys_is_found_by_trying(monkeypatch, shares):
    def kernel(query, key, value, *_, scale):
        """Each head has the value as many places behind the first as it has heads before it."""
        groups = query.shape[1] // value.shape[1]
        first = value.as_strided(query.shape, value.stride())
        return (value.repeat_interleave(groups, 1) if shares else first), None

    assert key_bias.shares_keys.__wrapped__()  # this torch
    monkeypatch.setattr(key_bias, "_row_kernel", kernel)
    assert key_bias.shares_keys.__wrapped__() == shares


def test_a_mask_says_the_same():
    mask = KeyBias(torch.tensor([[LOW, math.log(3), 0.0]])).mask(torch.float16)
    low = torch.finfo(torch.float16).min
    assert mask.tolist() == [[[[low, low, low], [low, torch.tensor(math.log(3)).half().item(), low],
                               [low, torch.tensor(math.log(3)).half().item(), 0.0]]]]  # fmt: skip


@pytest.mark.parametrize(
    "device,n,width,options,way",
    [
        ("cpu", 2, 64, {}, "row"),
        ("cpu", 2, 64, {"requires_grad": True}, "mask"),
        ("cpu", 2, 64, {"values": 32}, "mask"),
        ("cpu", 2, 64, {"dropout": 0.1}, "mask"),
        ("cpu", 2, 64, {"dtype": torch.float64}, "mask"),
        ("cpu", 2, 64, {"stride": 2}, "mask"),
        ("cpu", 2, 64, {"shares": False}, "row"),
        ("cpu", 2, 64, {"shares": False, "groups": 1}, "mask"),
        ("cuda", FOLD_FROM, 64, {"dtype": torch.float64}, "mask"),
        ("cuda", FOLD_FROM, 128, {}, "fold"),
        ("cuda", FOLD_FROM - 1, 128, {}, "mask"),
        ("cuda", FOLD_FROM, 256, {}, "mask"),
        ("mps", FOLD_FROM, 64, {}, "mask"),
    ],
)
def test_the_way_goes_by_device_length_and_width(monkeypatch, device, n, width, options, way):
    def tensor(width, heads=2):
        return SimpleNamespace(shape=(1, heads, n, width), dtype=options.get("dtype", torch.float16),
                               device=SimpleNamespace(type=device), stride=lambda _: options.get("stride", 1),
                               requires_grad=options.get("requires_grad", False))  # fmt: skip

    monkeypatch.setattr(key_bias, "shares_keys", lambda: options.get("shares", True))
    key, value = tensor(width, options.get("groups", 2)), tensor(options.get("values", width), options.get("groups", 2))
    assert best_way(tensor(width), key, value, options.get("dropout", 0)) == way


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_all_ways_are_one_in_every_family(monkeypatch, name):
    """Prefill and a decoded token, alone and padded. Layers with windows or blocks keep their masks in all of them."""
    tiny, target = FAMILIES[name], model(name, "sdpa")
    for rows in [["image", 5, 6, 7]], [["image", 5, 6, 7], [3, 4, "image", 9, 8, 11, 12]]:
        logits, used = {}, {}
        for way in WAYS.get(name, ("mask", "row", "fold")):
            force(monkeypatch, way)
            used[way] = []
            seen = lambda *given, own=used[way], **options: own.append(given[1]) or attend(*given, **options)  # noqa: E731
            monkeypatch.setattr("codebook.pruning.engine.tap.attend", seen)
            with SCHEDULE(target):
                out = target.generate(**tiny.inputs(rows), max_new_tokens=2, do_sample=False, output_logits=True,
                                      return_dict_in_generate=True, suppress_tokens=list(tiny.never))  # fmt: skip
            logits[way] = torch.stack(out.logits, 1)
        assert all(modules == used["mask"] for modules in used.values()) and bool(used["mask"]) != (name in BLOCKS)
        for ours in logits.values():
            assert (ours - logits["mask"]).abs().max() <= tiny.tolerance * logits["mask"].abs().max()


@torch.no_grad()
def test_no_mask_of_queries_by_keys_is_made(monkeypatch):
    """Alone and padded; and nothing of it is left when the context is."""
    target, layers = llava(), []
    stocks = [layer.self_attn.config for layer in target.model.language_model.layers]
    for layer in target.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: layers.append(kwargs["attention_mask"]), with_kwargs=True
        )
    with SCHEDULE(target):
        for rows in ONE, RAGGED:
            target(**prompt(target, rows))
    assert layers == [None] * 8 and key_bias.ADDED.get() is None
    assert all(a.self_attn.config is b for a, b in zip(target.model.language_model.layers, stocks, strict=True))


def test_with_gradients_it_is_a_mask():
    """The CPU's kernel is not asked for gradients through keys that share heads."""
    target = llava()
    with SCHEDULE(target):
        target(**prompt(target, ONE)).logits.sum().backward()
    assert target.model.language_model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_attention_that_adds_nothing_is_an_error(monkeypatch):
    target = llava()
    monkeypatch.setattr(hooks, "point", lambda module: lambda: None)
    with SCHEDULE(target), pytest.raises(CodebookError, match="attn_implementation='eager'"):
        target(**prompt(target, ONE))
    monkeypatch.undo()
    with SCHEDULE(target):
        target(**prompt(target, ONE))
