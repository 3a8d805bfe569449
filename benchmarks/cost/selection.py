"""What choosing costs: the time of each method's selection, merging included, as a share of the model's prefill.

    python -m benchmarks.cost.selection
    python -m benchmarks.cost.selection --widths 4096 --tokens 576 --json

At width 512 the prefill is that of a 12-layer random Llama (8 heads, feed-forward 1376), at width 4096 one measured
layer of LLaVA-1.5-7B's size (32 heads, feed-forward 11008) times 32. The prompt is the visual tokens and 32 of text,
one image, fp32. Tokens are random: how long a selection takes does not depend on what they hold. DivPrune is compared
with its textbook form, which goes over all chosen tokens at every step. What `+mass` adds to any method, counting the
dropped tokens to the kept ones, has a row of its own. Re-encoding by `downsample` is not timed.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import LlamaConfig, LlamaModel

from benchmarks.cost.timing import Report, clocked, device_seconds, interleaved, machine, quartiles
from codebook import Codebook, Pruner, VisualTokens
from codebook.pruning import METHODS
from codebook.pruning.attention import Attention, Vision
from codebook.pruning.methods.base import nearest_kept

TEXT = 32
ROUNDS = 7
SIMILARITIES, TEXTBOOK, MASS = "similarities, n x n", "divprune, textbook", "+mass"
PROTOTYPES = 454
"""Of LLaVA-1.5-7B's released codebook."""
SHAPES = {512: (12, 12, 8, 1376), 4096: (32, 1, 32, 11008)}
"""For each width: layers, layers measured, heads, feed-forward width."""


def llama(width: int, device: str) -> tuple[LlamaModel, int]:
    """A random decoder, and how often its time makes the whole prefill."""
    layers, measured, heads, intermediate = SHAPES[width]
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=intermediate, num_hidden_layers=measured,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip
    return LlamaModel(config).eval().to(device), layers // measured


def image(n: int, width: int, device: str, dtype: torch.dtype = torch.float32) -> VisualTokens:
    """A random image's tokens followed by text, with the attention of a decoder layer and of a CLIP tower."""
    kind = {"device": device, "dtype": dtype}
    heads, length = SHAPES[width][2], n + TEXT
    rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    sequence = torch.randn(length, width, **kind)
    span = slice(0, n)
    query, key = torch.randn(2, heads, length, width // heads, **kind)
    angles = torch.randn(length, width // heads, **kind)
    attention = Attention(query, key, angles.cos(), angles.sin(), (width // heads) ** -0.5, span)
    vision = Vision(*torch.randn(2, 16, n + 1, 64, **kind), 64**-0.5, has_cls=True)
    return VisualTokens(
        sequence[span], sequence[span], sequence, span, torch.arange(n, length, device=device),
        torch.arange(n, device=device), (rows, n // rows), torch.tensor(7, device=device), attention, vision,
        lambda r, c: sequence[: r * c],
    )  # fmt: skip


def textbook(tokens: VisualTokens, keep: int) -> torch.Tensor:
    """Algorithm 1 of DivPrune (arXiv 2503.02175) to the letter: O(keep^2 n)."""
    unit = normalize(tokens.features.float(), dim=-1)
    distance = 1 - unit @ unit.T
    chosen: list[int] = []
    while len(chosen) < keep:
        if chosen:
            nearest = distance[chosen].min(0).values
            nearest[chosen] = -1
        else:
            nearest = distance.topk(2, dim=0, largest=False).values[1]
        chosen.append(int(nearest.argmax()))
    return torch.tensor(sorted(chosen))


def choose(pruner: Pruner, tokens: VisualTokens, keep: int) -> None:
    index = pruner.choose(tokens) if pruner.adaptive else pruner.select(tokens, keep)
    pruner.merge(tokens, index)


def mass(tokens: VisualTokens, kept: torch.Tensor) -> torch.Tensor:
    ones = torch.ones_like(tokens.ordinal)
    return ones.new_zeros(len(kept)).index_add(0, nearest_kept(tokens.hidden, kept), ones).log()


def similarities(tokens: VisualTokens) -> torch.Tensor:
    unit = normalize(tokens.features.float(), dim=-1)
    return unit @ unit.T


def counts_of(n: int, keeps: list[float]) -> list[int]:
    """How many stay, as `downsample` can make it too."""
    return [round(keep * n) // 12 * 12 for keep in keeps]


def choices(book: Codebook, tokens: VisualTokens, counts: list[int]) -> dict[tuple[str, int], Callable[[], object]]:
    """Every method's choice of every count, and what `+mass` adds to any."""
    tasks: dict[tuple[str, int], Callable[[], object]] = {}
    for name, factory in METHODS.items():
        if name != "drop":
            pruner = factory(book) if factory.needs_codebook else factory()
            tasks |= {(name, c): lambda pruner=pruner, c=c: choose(pruner, tokens, c) for c in counts}
    return tasks | {(MASS, c): lambda c=c: mass(tokens, tokens.ordinal[:c]) for c in counts}


def side_by_side(report: Report, n: int, keeps: list[float], device: str, dtype: torch.dtype) -> None:
    """Time every method at LLaVA-1.5-7B's width, and write down after each round what is known by then.

    `wall`: until the device is done. `host`: until the host has said what is to be done. `device`: what the device
    takes where it need not wait for the host.
    """
    book, tokens = Codebook(torch.randn(PROTOTYPES, 4096)), image(n, 4096, device, dtype)
    tasks = choices(book, tokens, counts_of(n, keeps))
    times: dict[tuple[str, int], dict[str, list[float]]] = {key: {} for key in tasks}
    for task in tasks.values():
        task()
    for _ in range(ROUNDS):
        for key, task in tasks.items():
            wall, host, _ = clocked(task, device)
            measured = {"wall": wall, "host": host}
            if device == "cuda":
                measured["device"] = device_seconds(task, host)
            for name, value in measured.items():
                times[key].setdefault(name, []).append(value)
        for (method, count), own in times.items():
            row = {"part": "selection", "tokens": n, "method": method, "count": count}
            report.put(row, **{name: quartiles(values) for name, values in own.items()})
        if report.left < 0:
            break


def lines(rows: list[dict[str, Any]], prefill: dict[int, float]) -> Iterator[str]:
    """The table of `side_by_side`; `prefill` has for each number of tokens the unpruned model's seconds."""
    yield f"{'tokens':>6}  {'method':<20}{'keeps':>6}{'wall ms':>10}{'host ms':>10}{'device ms':>10}{'of prefill':>12}"
    for row in rows:
        wall, host, device = (row.get(name, {}).get("median") for name in ("wall", "host", "device"))
        share = f"{wall / prefill[row['tokens']]:.2%}" if row["tokens"] in prefill else ""
        alone = "" if device is None else f"{device * 1e3:.3f}"
        yield (f"{row['tokens']:>6}  {row['method']:<20}{row['count']:>6}{wall * 1e3:>10.3f}{host * 1e3:>10.3f}"
               f"{alone:>10}{share:>12}")  # fmt: skip


def compare(width: int, n: int, keeps: list[float], seconds: float, device: str) -> dict:
    decoder, times = llama(width, device)
    book, tokens = Codebook(torch.randn(PROTOTYPES, width)), image(n, width, device)
    counts = counts_of(n, keeps)
    inputs = tokens.sequence[None]
    tasks = {("prefill", n): lambda: decoder(inputs_embeds=inputs), (SIMILARITIES, n): lambda: similarities(tokens)}
    tasks |= choices(book, tokens, counts)
    tasks |= {(TEXTBOOK, c): lambda c=c: textbook(tokens, c) for c in counts}
    with torch.inference_mode():
        for c in counts:
            assert torch.equal(METHODS["divprune"]().select(tokens, c).cpu(), textbook(tokens, c))
        measured = {task: quartiles(values) for task, values in interleaved(tasks, seconds, device).items()}
    whole = measured["prefill", n]["median"] * times
    median = {task: row["median"] for task, row in measured.items()}
    both = median[SIMILARITIES, n]
    return {
        "width": width, "tokens": n, "prefill_seconds": whole, "prefill_layers_times": times,
        "rows": [{"name": name, "keep": c, "share": row["median"] / whole, **row}
                 for (name, c), row in measured.items()],
        "divprune_speedup": [
            {"keep": c, "whole": median[TEXTBOOK, c] / median["divprune", c],
             "after_similarities": (median[TEXTBOOK, c] - both) / (median["divprune", c] - both)}
            for c in counts
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.11, 0.25])
    parser.add_argument(
        "--seconds", type=float, default=40, help="for each width and number of tokens; 3 rounds at least"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    report = machine(options.device) | {"comparisons": []}
    if not options.json:
        print(f"{report['machine']}, {report['threads']} threads, torch {report['torch']}")
    for width in options.widths:
        for n in options.tokens:
            report["comparisons"].append(compare(width, n, options.keep, options.seconds, options.device))
            if not options.json:
                show(report["comparisons"][-1])
    if options.json:
        print(json.dumps(report, indent=1))


def show(report: dict) -> None:
    n, rows = report["tokens"], report["rows"]
    print(f"\nwidth {report['width']}, {n} visual tokens, {rows[0]['rounds']} rounds: prefill "
          f"{report['prefill_seconds'] * 1e3:.0f} ms")  # fmt: skip
    print(f"{'selector':<22}{'keeps':>6}{'ms':>10}  {'quartiles':<18}{'of prefill':>10}")
    for row in sorted(rows, key=lambda row: (row["keep"], row["median"])):
        spread = f"{row['q1'] * 1e3:.2f} - {row['q3'] * 1e3:.2f}"
        print(f"{row['name']:<22}{row['keep']:>6}{row['median'] * 1e3:>10.2f}  {spread:<18}{row['share']:>10.2%}")
    for row in report["divprune_speedup"]:
        print(f"DivPrune, {row['keep']} of {n}: {row['whole']:.1f} times as fast as its textbook form, "
              f"{row['after_similarities']:.1f} times without the similarities that both need")  # fmt: skip
    sys.stdout.flush()


if __name__ == "__main__":
    main()
