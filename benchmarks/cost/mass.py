"""What mass-preserving attention costs: the same schedules with and without it, side by side, at equal kept counts.

    python -m benchmarks.cost.mass
    python -m benchmarks.cost.mass --width 4096 --layers 1 --keep 0.25
    python -m benchmarks.cost.mass --images 5 --keep 0.5 0.25
    python -m benchmarks.cost.mass --miniature --schedules uniform
    python -m benchmarks.cost.mass --exactness

The model and prompt of `benchmarks.cost.prefill`: 12 layers, 512 wide, 576 visual tokens per image, 32 of text, fp32.
`--width 4096` has heads and feed-forward layers of LLaVA-1.5-7B; `--miniature` is the model that ships, with 144 visual
tokens per image: what does not grow with a model weighs most in it. Prefill holds hooks, selection, counting and cache;
decoding is 8 further tokens, one by one, on a pruned cache. `+mass` is what the engine does, `mask` the same numbers in
a mask of queries by keys; `count` is how long it takes to count what tokens stand for. Every way runs once a round,
every other round in reverse order, and ratios are taken round by round. On a CPU seconds are those of the process: what
else the machine does counts for less.

`--exactness`: the largest errors of attention's outputs against float64, for each way and precision.
"""

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.cost.prefill import IMAGE, KEEPS, TEXT, llava
from benchmarks.cost.timing import machine, quartiles, synchronize
from codebook import Codebook, Schedule, load
from codebook.pruning.engine import key_bias
from codebook.pruning.methods.base import nearest_kept_each

SHAPES = {512: {}, 4096: {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}}
WAYS = ("", "mask", "+mass")
STEPS = 8
ROUNDS = 3, 250
"""The fewest, whatever the time, and the most."""
TARGET = 1.01
BATCH, HEADS, GROUPS, WIDTH, LENGTH = 2, 8, 4, 128, 400
"""Of the attention whose exactness is measured; its numbers are logarithms of 1 to 576."""


@contextlib.contextmanager
def adding(way: str | None) -> Iterator[None]:
    """A context in which numbers are added to logits in this way; None for the engine's own choice."""
    with contextlib.nullcontext() if way is None else patch.object(key_bias, "best_way", lambda *_: way):
        yield


def seconds_of(task: Callable[[], Any], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    task()
    synchronize(device)
    return clock() - start


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = options.device
    if options.miniature:
        model = load("miniature", device)[0]
    else:
        model = llava(**SHAPES[options.width], num_hidden_layers=options.layers).to(device)
    image, n, config = model.config.image_token_id, model.config.image_seq_length, model.config.text_config
    width, layers = config.hidden_size, config.num_hidden_layers
    ids = torch.randint(1, min(IMAGE, image), (1, options.images * (n + 1) + TEXT), device=device)
    for i in range(options.images):
        ids[0, 4 + i * (n + 1) : 4 + i * (n + 1) + n] = image
    features = [torch.randn(n, width, device=device) for _ in range(options.images)]
    book = Codebook(torch.randn(454, width))

    def prefill(schedule: Schedule, way: str | None):
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        with adding(way), schedule(model):
            return model(input_ids=ids, mm_encoder_outputs=encoded, logits_to_keep=1, use_cache=True).past_key_values

    def decode(schedule: Schedule, cache) -> None:
        with schedule(model):
            for _ in range(STEPS):
                model(input_ids=ids[:, -1:], past_key_values=cache)
        cache.crop(-STEPS)

    def count(kept: int) -> None:
        places = torch.arange(options.images * n, device=device).view(options.images, n)
        nearest_kept_each(torch.cat(features), places, torch.arange(kept, device=device).expand(options.images, kept))

    rows = list(itertools.product(options.keep, options.schedules))
    tasks: dict[tuple[Any, ...], Callable[[], Any]] = {}
    for keep, row in rows:
        for way in WAYS:
            plan = Schedule.solve(row + ("+mass" if way else ""), book, keep=keep, n=n, layers=layers)
            tasks["prefill", row, keep, way] = partial(prefill, plan, way if way == "mask" else None)
            if way != "mask":
                tasks["decode", row, keep, way] = partial(decode, plan, prefill(plan, None))
            tasks["count", row, keep, way] = partial(count, plan.counts(n, layers)[0])
    times: dict[tuple[Any, ...], list[float]] = {name: [] for name in tasks}
    begun = time.monotonic()
    for done in range(ROUNDS[1] + 1):  # the first is no round: it warms up
        if done > ROUNDS[0] and time.monotonic() - begun > options.seconds:
            break
        for name in tasks if done % 2 else reversed(tasks):
            times[name].append(seconds_of(tasks[name], device))
    report = []
    for what, (keep, row) in itertools.product(("prefill", "decode"), rows):
        without = times[what, row, keep, ""][1:]
        for way in WAYS[1:]:
            if own := times.get((what, row, keep, way), [])[1:]:
                ratio = quartiles([b / a for a, b in zip(without, own, strict=True)])
                report.append({"what": what, "schedule": row, "keep": keep, "way": way, "without": quartiles(without),
                               "with": quartiles(own), "ratio": ratio, "least_ratio": min(own) / min(without),
                               "count": quartiles(times["count", row, keep, way][1:])})  # fmt: skip
    return report


def exactness(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each way's largest error, of outputs of up to about 4; `nothing added` is that of attention itself."""
    rows = []
    for dtype in torch.float32, torch.bfloat16, torch.float16:
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(BATCH, HEADS, LENGTH, WIDTH, generator=generator).to(options.device, dtype)
        pair = torch.randn(2, BATCH, HEADS // GROUPS, LENGTH, WIDTH, generator=generator).to(options.device, dtype)
        numbers = torch.randint(1, 577, (BATCH, LENGTH), generator=generator).float().log().to(options.device)
        key, value = (x.double().repeat_interleave(GROUPS, 1) for x in pair)
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=options.device).tril()
        for way in ("nothing added", "mask", "fold", *(["row"] if options.device == "cpu" else [])):
            row = numbers if way in ("mask", "fold", "row") else torch.zeros_like(numbers)
            logits = query.double() @ key.transpose(-1, -2) * WIDTH**-0.5 + row.double()[:, None, None]
            expected = (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)
            module, scaling = SimpleNamespace(num_key_value_groups=GROUPS), WIDTH**-0.5
            if way == "nothing added":
                out, _ = sdpa_attention_forward(module, query, *pair, None, scaling=scaling, is_causal=True)
            else:
                with adding(way):
                    out, _ = key_bias.attend(
                        sdpa_attention_forward, module, query, *pair, key_bias.KeyBias(row), scaling=scaling
                    )
            rows.append({"dtype": str(dtype), "way": way, "error": float((out.double() - expected).abs().max())})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of rounds; at least 3 are made and at most 250")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--width", type=int, default=512, choices=SHAPES)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--miniature", action="store_true", help="instead of a random model of that width and depth")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--schedules", nargs="+", default=["uniform", "codebook-farthest"])
    parser.add_argument("--exactness", action="store_true", help="of attention, instead of times")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        report = machine(options.device) | {"rows": (exactness if options.exactness else compare)(options)}
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{report['machine']}, {report['threads']} threads, torch {report['torch']}")
    for row in report["rows"]:
        if options.exactness:
            print(f"{row['dtype']:<16}{row['way']:<15}{row['error']:.2g}")
            continue
        ratio = row["ratio"]
        mark = "" if row["what"] == "decode" or ratio["median"] <= TARGET else f"  above {TARGET}"
        print(f"{row['what']:<9}{row['schedule']:<19}{row['keep']:<6}{row['way']:<7}"
              f"{row['without']['median'] * 1e3:>8.1f} ms{row['with']['median'] * 1e3:>8.1f} ms  ratio "
              f"{ratio['median']:.3f} ({ratio['q1']:.3f} - {ratio['q3']:.3f}), of the least {row['least_ratio']:.3f}, "
              f"count {row['count']['median'] * 1e3:.1f} ms, {ratio['rounds']} rounds{mark}")  # fmt: skip


if __name__ == "__main__":
    main()
