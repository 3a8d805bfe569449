"""The cost figures of docs/device.md, from one machine with a GPU; `benchmarks/cost/device.sh` runs all of it.

    python -m benchmarks.cost.device --parts selection llava --limit-seconds 200 --out device.json
    python -m benchmarks.cost.device --show device.json

`llava` (`benchmarks.cost.llava_shape`), `selection` and `attention` are those modules' measurements; `flex` is `llava`
with FlexAttention, compiled, instead of sdpa. After each row the JSON is written. When time is up nothing further is
begun, and the table shows what there is. Parts add to a JSON that is there.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost import attention, llava_shape, selection
from benchmarks.cost.timing import Report

PARTS = ("selection", "llava", "attention", "flex")
KEEPS = [1.0, 0.5, 0.22, 0.11, 0.056]
OF_TEXT, OF_PREFILL = 0.95, 0.01
"""Goals: the least speed of the prefill, of what text of that length has; the largest share of a selection in it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit-seconds", type=float, default=480, help="after which nothing further is begun")
    parser.add_argument("--layers", type=int, default=32, help="of the decoder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--out", type=Path, default=Path("device.json"))
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the table of a finished run and do nothing")
    options = parser.parse_args()
    if options.show:
        show(json.loads(options.show.read_text()))
        return
    torch.manual_seed(0)
    report = Report(options.out, options.device, options.limit_seconds)
    with torch.inference_mode():
        for part in options.parts:
            begun = time.monotonic()
            measure(part, report, options)
            print(f"{part}: {time.monotonic() - begun:.0f} s, {report.left:.0f} s left", file=sys.stderr, flush=True)
    show(report.content)


def measure(part: str, report: Report, options: argparse.Namespace) -> None:
    device, dtype = options.device, torch.bfloat16 if options.device == "cuda" else torch.float32
    keeps = [keep for keep in options.keep if keep < 1]
    if part == "selection":
        for n in options.tokens:
            if report.left > 0:
                selection.side_by_side(report, n, keeps, device, dtype)
    elif part == "attention":
        for n in options.tokens:
            for batch in options.batches[:2]:
                if report.left > 0:
                    attention.compare(report, batch, n + llava_shape.TEXT, device)
                    llava_shape.clear(device)
    else:
        flex = part == "flex"
        if flex:
            torch._dynamo.config.recompile_limit = 64  # beyond it FlexAttention would run uncompiled, without a word
        model = llava_shape.build(options.layers, device, dtype, "flex_attention" if flex else "sdpa")
        if not flex:
            report.content |= {"layers": options.layers, "dtype": str(dtype), "weights_bytes": weights(model)}
            llava_shape.contexts(report, model)
            llava_shape.tower(report, model)
        for batch in options.batches[:2] if flex else options.batches:  # it compiles for every shape
            for tokens in options.tokens:
                if report.left > 0:
                    ways = ["codebook+mass"] if flex else ["codebook", "codebook+mass", "text"]
                    llava_shape.compare(report, model, tokens, batch, keeps if flex else options.keep, ways)
        if flex:
            report.put({"part": "compiler"}, graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"])


def weights(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def show(content: dict[str, Any]) -> None:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        rows.setdefault(row["part"], []).append(row)
    print(f"{content['machine']}, torch {content['torch']}, {content.get('dtype')}, {content.get('layers')} layers")
    print("times: first quartile, median, third quartile; goals: prefill at least "
          f"{OF_TEXT} of the speed of text alone, selectors under {OF_PREFILL:.0%} of the prefill")  # fmt: skip
    for row in rows.get("context", []):
        print(f"opening and leaving a context: {llava_shape.ms(row['seconds'])} ms")
    for row in rows.get("tower", []):
        print(f"vision tower and projector, {row['images']} images: {llava_shape.ms(row['seconds'])} ms")
    if llava := rows.get("llava"):
        print("", *llava_shape.lines(llava, llava), sep="\n")
        goals = [row for row in llava if "of_text" in row and row["keep"] < 1]
        met = sum(row["of_text"]["median"] >= OF_TEXT for row in goals)
        print(f"{met} of {len(goals)} settings reach {OF_TEXT} of the speed of text alone")
    if chosen := rows.get("selection"):
        prefill = {
            row["tokens"]: row["prefill"]["median"] for row in rows.get("llava", [])
            if row["batch"] == 1 and row["keep"] == 1 and row["way"] == "codebook" and "prefill" in row
        }  # fmt: skip
        print("", *selection.lines(chosen, prefill), sep="\n")
        known = [row for row in chosen if row["tokens"] in prefill]
        for what in ("wall", "device"):
            under = sum(row[what]["median"] < OF_PREFILL * prefill[row["tokens"]] for row in known if what in row)
            print(f"{under} of {len(known)} selections take under {OF_PREFILL:.0%} of the unpruned prefill ({what})")
    if kernels := rows.get("attention"):
        print("", *attention.lines(kernels), sep="\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
