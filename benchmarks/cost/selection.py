"""What choosing costs: every method's selection, merging included, against a plain transcription of its published rule.

    OMP_NUM_THREADS=1 python -m benchmarks.cost.selection
    OMP_NUM_THREADS=1 python -m benchmarks.cost.selection --widths 4096 --tokens 576 --methods divprune cdpruner --json

The transcriptions stand in `benchmarks/cost/published.py`. Tokens are random, one image, fp32: how long a selection
takes does not depend on what they hold. Methods for films are given one whose frames are the image's rows. Method and
transcription take turns, so that other load falls on both alike, and their processor time counts, not the clock's; what
is short is repeated within a turn. A ratio is the time of the transcription over the method's, the median over rounds:
below 1 the method is the slower. What `+mass` adds to any method, counting the dropped tokens to the kept ones, has a
row of its own. Where transcription and method must keep the same tokens (`SAME`) this is asserted. Not timed:
`downsample`, which encodes the image anew.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.cost.published import PUBLISHED, SAME
from benchmarks.cost.timing import Report, clocked, device_seconds, machine, quartiles
from codebook import Codebook, Pruner, VisualTokens
from codebook.pruning import METHODS
from codebook.pruning.attention import Attention, Vision
from codebook.pruning.methods.base import nearest_kept

TEXT = 32
ROUNDS = 7
MASS = "+mass"
PROTOTYPES = 454
"""Those of LLaVA-1.5-7B's released codebook."""
HEADS = {1024: 16, 4096: 32}
"""For each width the heads of a decoder."""
PATCH = 14
"""Side of a token's patch in pixels."""
TURN = 0.01
"""Seconds that a turn takes at least: shorter selections are repeated."""


def image(n: int, width: int, device: str, dtype: torch.dtype = torch.float32) -> VisualTokens:
    """A random image's tokens followed by text, with the attention of a decoder layer and of a CLIP tower."""
    kind = {"device": device, "dtype": dtype}
    heads, length = HEADS[width], n + TEXT
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
        whole=sequence[span], words=sequence[n:], norm=lambda states: states,
        pixels=torch.rand(3, rows * PATCH, n // rows * PATCH, device=device), encode=lambda r, c: sequence[: r * c],
    )  # fmt: skip


def choose(pruner: Pruner, tokens: VisualTokens, keep: int) -> None:
    tokens = replace(tokens, known={})  # what a pruner remembers of one choice it may not use for the next
    index = pruner.choose(tokens) if pruner.adaptive else pruner.select(tokens, keep)
    pruner.merge(tokens, index)


def film(tokens: VisualTokens) -> list[VisualTokens]:
    """A film whose frames are an image's rows."""
    return [replace(VisualTokens.of(row), whole=row) for row in tokens.features.view(*tokens.grid, -1)]


def numbered(kept: list[torch.Tensor], frames: list[VisualTokens]) -> torch.Tensor:
    """The tokens that stay of a film's frames, numbered through."""
    return torch.cat([index + i * len(frame) for i, (frame, index) in enumerate(zip(frames, kept, strict=True))])


def mass(tokens: VisualTokens, kept: torch.Tensor) -> torch.Tensor:
    ones = torch.ones_like(tokens.ordinal)
    return ones.new_zeros(len(kept)).index_add(0, nearest_kept(tokens.hidden, kept), ones).log()


def counts_of(n: int, keeps: list[float]) -> list[int]:
    """How many stay, as `downsample` can make it too."""
    return [round(keep * n) // 12 * 12 for keep in keeps]


def choices(book: Codebook, tokens: VisualTokens, counts: list[int]) -> dict[tuple[str, int], Callable[[], object]]:
    """Every method's choice of every count in one image, and what `+mass` adds to any."""
    tasks: dict[tuple[str, int], Callable[[], object]] = {}
    for name, factory in METHODS.items():
        if name != "drop" and not factory.joint:
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


def turn(task: Callable[[], object], times: int) -> float:
    """Processor seconds of a task that is run so many times, per run."""
    start = time.process_time()
    for _ in range(times):
        task()
    return (time.process_time() - start) / times


def compare(width: int, n: int, counts: list[int], methods: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """For each method and count its times, those of its transcription, and their ratio, in quartiles."""
    book, tokens = Codebook(torch.randn(PROTOTYPES, width)), image(n, width, "cpu")
    frames = film(tokens)
    tasks = choices(book, tokens, counts)
    for name, count in ((name, count) for name in methods for count in counts):
        if name in METHODS and METHODS[name].joint:
            own = partial(METHODS[name]().select_frames, frames, count)
            rule = partial(PUBLISHED[name], book, frames, count)
        else:
            own, rule = tasks[name, count], partial(PUBLISHED[name], book, tokens, count)
        if name in SAME:
            pruner = METHODS[name](book) if METHODS[name].needs_codebook else METHODS[name]()
            kept = numbered(own(), frames) if METHODS[name].joint else pruner.select(tokens, count)
            assert torch.equal(kept, rule()), f"{name} keeps others than its transcription"
        pairs = []
        times = [max(1, math.ceil(TURN / turn(task, 1))) for task in (own, rule)]
        for _ in range(rounds):
            pairs.append([turn(task, many) for task, many in zip((own, rule), times, strict=True)])
        columns = {
            "seconds": [a for a, _ in pairs],
            "published": [b for _, b in pairs],
            "ratio": [b / a for a, b in pairs],
        }
        yield {"width": width, "tokens": n, "method": name, "keep": count} | {
            k: quartiles(v) for k, v in columns.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--keep", type=int, nargs="+", default=[64, 192], help="tokens that stay")
    parser.add_argument("--methods", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = machine("cpu") | {"rows": []}
    if not options.json:
        print(f"{report['machine']}, {report['threads']} threads, torch {report['torch']}")
        print(f"{'d':>5}{'n':>6}  {'selector':<20}{'keeps':>6}{'ms':>10}{'published':>10}{'ratio':>7}  quartiles")
    with torch.inference_mode():
        for width in options.widths:
            for n in options.tokens:
                for row in compare(width, n, options.keep, options.methods, options.rounds):
                    report["rows"].append(row)
                    if not options.json:
                        print(line(row), flush=True)
    ratios = [row["ratio"]["median"] for row in report["rows"]]
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)} below 1, median {statistics.median(ratios):.2f}")


def line(row: dict[str, Any]) -> str:
    own, published, ratio = row["seconds"]["median"], row["published"]["median"], row["ratio"]
    return (
        f"{row['width']:>5}{row['tokens']:>6}  {row['method']:<20}{row['keep']:>6}{own * 1e3:>10.3f}"
        f"{published * 1e3:>10.3f}{ratio['median']:>7.2f}  {ratio['q1']:.2f} - {ratio['q3']:.2f}"
    )


if __name__ == "__main__":
    main()
