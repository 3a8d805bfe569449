"""Four ways to add one number per key to attention's logits, by the kernel alone: what mass-preserving attention needs.

    python -m benchmarks.cost.device --parts attention

Causal attention of 32 heads of 128 over n tokens, in bfloat16. `flash`: without numbers, the fastest there is. `mask`:
a mask of numbers (B, 1, n, n), as the engine has it. `flex`: FlexAttention, compiled, whose `score_mod` adds the key's
number. `folded`: heads of 136 in which the numbers are (`codebook/pruning/engine/key_bias.py`), `and made`: with the
copies of queries, keys and values that it takes. Where `folded and made` is faster than `mask`, both by stock's choice,
the engine should fold: its `FOLD_FROM`. Errors are the largest differences from float64 on the same inputs; those of
`no numbers` are from float64 without numbers.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cost.llava_shape import ANY_MISTAKE, ms, reason
from benchmarks.cost.timing import Report, clocked, device_seconds, quartiles
from codebook.pruning.engine.key_bias import KeyBias, folded_heads

HEADS, WIDTH = 32, 128
SCALE = WIDTH**-0.5
ROUNDS = 9
BACKENDS = {"cuda": {"flash": [SDPBackend.FLASH_ATTENTION], "cudnn": [SDPBackend.CUDNN_ATTENTION],
                     "efficient": [SDPBackend.EFFICIENT_ATTENTION], "stock's choice": []},
            "cpu": {"flash": [], "stock's choice": []}}  # fmt: skip


def inputs(batch: int, n: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, heads, n, d) in bfloat16, and each key's number (B, n): logarithms of 1 to 40."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, batch, HEADS, n, WIDTH, generator=generator, device=device).bfloat16()
    mass = torch.randint(1, 41, (batch, n), generator=generator, device=device)
    return q, k, v, mass.float().log()


def mask_of(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, n, n): each key's number, and where a query does not see it the least number there is."""
    n = bias.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool, device=bias.device).tril()
    return torch.where(seen, bias.to(dtype)[:, None, None], torch.finfo(dtype).min)


def flex(bias: Tensor, n: int, device: str) -> Callable[..., Tensor]:
    """FlexAttention, compiled, causal by blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    blocks = create_block_mask(lambda b, h, q, k: q >= k, None, None, n, n, device=device)

    def with_number(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + bias[b, k]

    return functools.partial(compiled, score_mod=with_number, block_mask=blocks, scale=SCALE)


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The first prompt's output in float64, head by head."""
    out, seen = [], torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    for query, key, value in zip(q[0].double(), k[0].double(), v[0].double(), strict=True):
        logits = query @ key.T * SCALE + (0 if bias is None else bias[0].double())
        out.append(logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value)
    return torch.stack(out)


def ways(batch: int, n: int, device: str) -> Iterator[tuple[str, Callable[[], Tensor], bool]]:
    """Name, call, and whether it adds the numbers. What is made beforehand is no part of a call unless it says so."""
    q, k, v, bias = inputs(batch, n, device)
    mask, numbers = mask_of(bias, q.dtype), KeyBias(bias)
    wide = folded_heads(q, k, v, numbers, SCALE)

    def sdpa(backends: list[SDPBackend], *given: Tensor, **options: Any) -> Tensor:
        with sdpa_kernel(backends) if backends else torch.no_grad():
            return scaled_dot_product_attention(*given, scale=SCALE, **options)

    for name, backend in BACKENDS[device].items():
        yield f"no numbers, {name}", functools.partial(sdpa, backend, q, k, v, is_causal=True), False
        if name != "flash" or device == "cpu":  # flash kernels take no mask
            yield f"mask, {name}", functools.partial(sdpa, backend, q, k, v, attn_mask=mask), True
        yield (f"folded, {name}", lambda backend=backend: sdpa(backend, *wide, is_causal=True)[..., :WIDTH], True)
        yield (f"folded and made, {name}", lambda backend=backend: sdpa(
            backend, *folded_heads(q, k, v, numbers, SCALE), is_causal=True)[..., :WIDTH], True)  # fmt: skip
    if device == "cuda":  # compiled for CPUs it may end the process; last, since on GPUs it may spoil the context
        compiled = flex(bias, n, device)
        yield "flex, compiled", lambda: compiled(q, k, v), True


def compare(report: Report, batch: int, n: int, device: str) -> None:
    q, k, v, bias = inputs(batch, n, device)
    expected = {False: exact(q, k, v, None), True: exact(q, k, v, bias)}
    tasks, errors = {}, {}
    for name, task, adds in ways(batch, n, device):
        row = {"part": "attention", "batch": batch, "n": n, "way": name}
        if report.left < 0:
            return
        try:
            errors[name] = float((task()[0].double() - expected[adds]).abs().max())
            task()
            tasks[name] = task
        except ANY_MISTAKE as error:
            report.put(row, failed=reason(error))
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(ROUNDS):
        for name, task in tasks.items():
            wall, said, _ = clocked(task, device)
            times[name].append(device_seconds(task, said) if device == "cuda" else wall)
    for name, values in times.items():
        report.put(
            {"part": "attention", "batch": batch, "n": n, "way": name}, seconds=quartiles(values), error=errors[name],
            largest=float(expected[True].abs().max()),
        )  # fmt: skip


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'batch':>5}{'n':>6}  {'way':<30}{'device ms':<24}{'largest error':>14}"
    for row in rows:
        head = f"{row['batch']:>5}{row['n']:>6}  {row['way']:<30}"
        yield head + (row["failed"] if "failed" in row else f"{ms(row['seconds']):<24}{row['error']:>14.2e}")
