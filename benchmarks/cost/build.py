"""What a build costs: the published procedure, beside the cascade, on the same images of the miniature.

    python -m benchmarks.cost.build compare            # both, at the preset and at about 3% of the tokens surviving
    python -m benchmarks.cost.build grow --counts 100 1000 10000 --settings selective   # cost against images
    python -m benchmarks.cost.build memory --counts 1000 10000   # memory against images, with a stub for the probes
    python -m benchmarks.cost.build cluster --counts 10000 40000   # clustering of many survivors, time and memory

`compare` runs each way in a process of its own, for its peak memory, one after the other: `published` is one forward a
probe of whole sequences, on every candidate; `exhaustive` the same probes in batches that share what they can;
`cascade` what `codebook build` does. Then it computes what LLaVA-1.5-7B would cost from the measured shares.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from PIL import Image

from codebook import Codebook, models
from codebook.building import Source, build, preset
from codebook.building.cascade import Survivors
from codebook.building.clustering import dpc_knn
from codebook.building.worker import Outcome, Worker
from codebook.miniature.scenes import scene

SEED = 77


def one_by_one(worker: Worker, names: list[str]) -> Iterable[Outcome]:
    """An engine that shares nothing between sequences, as the published code does."""
    worker.prober = worker.prober.one_by_one()
    return map(worker, names)


WAYS = {
    "published": {"exhaustive": True, "engine": one_by_one},
    "exhaustive": {"exhaustive": True},
    "cascade": {},
}
SETTINGS = {
    "preset": {},
    # about 3% of the probed tokens survive the image's own conditions, as on LLaVA-1.5-7B (1383 of 48 000)
    "selective": {"tau_j": 0.03, "min_image_fraction": 0.02},
    # and with 144 tokens of an image probed instead of 24, nearer to LLaVA's 96
    "selective, all tokens": {
        "candidates": "all", "tau_j": 0.08, "max_cluster_size": 12, "min_image_fraction": 0.02,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    compare_ = commands.add_parser("compare")
    compare_.add_argument("--images", type=int, default=20)
    compare_.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    grow_ = commands.add_parser("grow")
    grow_.add_argument("--counts", type=int, nargs="+", default=[100, 1000])
    grow_.add_argument("--settings", choices=SETTINGS, default="preset")
    cluster_ = commands.add_parser("cluster")
    cluster_.add_argument("--counts", type=int, nargs="+", default=[10_000, 40_000])
    one = commands.add_parser("one")  # a build in a process of its own
    one.add_argument("folder", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("way", choices=WAYS)
    one.add_argument("settings", choices=SETTINGS)
    memory_ = commands.add_parser("memory")
    memory_.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000])
    stub = commands.add_parser("stub")
    stub.add_argument("count", type=int)
    stub.add_argument("out", type=Path)
    single = commands.add_parser("points")
    single.add_argument("count", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the same for all, and bit for bit the same after a kill
    with tempfile.TemporaryDirectory() as folder:
        if options.command == "one":
            measure(options.folder, options.out, options.way, options.settings)
        elif options.command == "points":
            points(options.count)
        elif options.command == "stub":
            stubbed(options.count, options.out)
        elif options.command == "memory":
            for count in options.counts:
                print(run("stub", count, Path(folder) / str(count)), flush=True)
        elif options.command == "compare":
            compare(Path(folder), options.images, options.settings)
        elif options.command == "grow":
            grow(Path(folder), options.counts, options.settings)
        else:
            for count in options.counts:
                print(run("points", count), flush=True)


def measure(folder: Path, out: Path, way: str, name: str) -> None:
    """Build, counting the LLM's forwards and tokens, and print a line of JSON."""
    model, processor = models.load("miniature", "cpu")
    settings = replace(preset("miniature"), **SETTINGS[name])
    forwards: list[int] = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    start, busy = time.perf_counter(), time.process_time()
    book = build(model, processor, folder, out, model_id="miniature", settings=settings, **WAYS[way])
    print(json.dumps({
        "seconds": time.perf_counter() - start, "cpu": time.process_time() - busy,
        "forwards": len(forwards), "tokens": sum(forwards),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "funnel": book.config["funnel"],
    }))  # fmt: skip


def compare(folder: Path, count: int, names: list[str]) -> None:
    images = scenes(folder, count)
    for name in names:
        print(f"\n{name}: {SETTINGS[name] or 'the miniature as it ships'}, {count} images")
        print(f"{'way':<12}{'wall s':>8}{'CPU s':>8}{'forwards':>10}{'tokens':>10}{'MiB':>7}")
        rows = {}
        for way in WAYS:
            rows[way] = row = run("one", images, folder / f"{name}-{way}", way, name)
            print(f"{way:<12}{row['seconds']:>8.2f}{row['cpu']:>8.2f}{row['forwards']:>10}{row['tokens']:>10}"
                  f"{row['memory']:>7.0f}", flush=True)  # fmt: skip
        cheap, funnel = rows["cascade"], rows["cascade"]["funnel"]
        books = [Codebook.load(folder / f"{name}-{way}") for way in WAYS]
        same = all(torch.equal(book.prototypes, books[0].prototypes) for book in books) and all(
            [key(row) for row in book.provenance] == [key(row) for row in books[0].provenance] for book in books
        )
        print("funnel: " + " -> ".join(f"{step} {n}" for step, n in funnel.items())
              + f"; {funnel['JSD'] / funnel['probed']:.1%} of probed tokens survive")  # fmt: skip
        for way in ("published", "exhaustive"):
            fewer = {unit: rows[way][unit] / cheap[unit] for unit in ("tokens", "forwards", "seconds", "cpu")}
            print(f"cascade against {way}: " + ", ".join(f"{times:.1f}x fewer {unit}" for unit, times in fewer.items()))
        print(f"prototypes identical: {'yes' if same else 'NO'} ({len(books[0])})")
        on_paper(funnel, count)


def on_paper(funnel: dict[str, int], count: int) -> None:
    """Tokens and FLOPs an image of LLaVA-1.5-7B, if its tokens survived each step in these shares."""
    visual, probed, before, after = 576, 96, 5, 35  # `USER: ` and the question with ` ASSISTANT:`
    text, (d, m, layers) = before + after, (4096, 11008, 32)

    def flops(new: float, context: float) -> float:
        """Of `new` tokens that attend to `context` tokens on average; multiply and add are two."""
        return layers * new * (2 * (4 * d * d + 3 * d * m) + 4 * context * d)

    lengths = {1: probed, 9: 2 * probed, visual: probed + 1}
    dear = sum(times * (n + text) for n, times in lengths.items())
    dear_flops = sum(times * flops(n + text, (n + text) / 2) for n, times in lengths.items())
    share = {step: n / funnel["probed"] for step, n in funnel.items()}
    # a divergence in the region alone drops some more before the image pass; the survivors are a floor, P1 the ceiling
    alone, near = probed * share["isolated"], 2 * probed * share["P1"]
    some = min(1.0, probed * share["JSD"])  # of images that need the intact pass, at most
    for name, far in (("at least", probed * share["JSD"]), ("at most", probed * share["P1"])):
        half = visual / 2 + after  # the image before a region is shared
        cheap = alone * (1 + after) + near * (9 + after) + min(1.0, max(some, far)) * (visual + text) + far * half
        cheap_flops = (
            flops(alone * (1 + after), text / 2) + flops(near * (9 + after), text / 2)
            + flops(min(1.0, max(some, far)) * (visual + text), (visual + text) / 2)
            + flops(far * half, 0.75 * (visual + text))
        )  # fmt: skip
        print(
            f"LLaVA-1.5-7B on paper, an image: published {dear} tokens, {dear_flops / 1e12:.0f} TFLOP; cascade {name} "
            f"{cheap:.0f} tokens, {cheap_flops / 1e12:.1f} TFLOP: {dear / cheap:.0f}x, {dear_flops / cheap_flops:.0f}x"
        )


def grow(folder: Path, counts: list[int], name: str) -> None:
    print(f"{'images':>8}{'wall s':>9}{'CPU s':>9}{'CPU s/image':>13}{'MiB':>7}")
    for count in counts:
        row = run("one", scenes(folder / str(count), count), folder / f"out-{count}", "cascade", name)
        print(
            f"{count:>8}{row['seconds']:>9.1f}{row['cpu']:>9.1f}{row['cpu'] / count:>13.4f}{row['memory']:>7.0f}",
            flush=True,
        )


def stubbed(count: int, out: Path, every: int = 20) -> None:
    """Build from images that nobody probes, one survivor in every twentieth: what the build itself holds in memory."""
    model, processor = models.load("miniature", "cpu")
    source = Source("nowhere", tuple(f"{i:07d}.png" for i in range(count)), str.encode)

    def pretend(worker: Worker, names: list[str]) -> Iterable[Outcome]:
        for i, name in enumerate(names):
            found = int(i % every == 0)
            token = {"row": 1, "col": 2, "p1": 0.1, "jsd_region": 0.1, "jsd_global": 0.2}
            funnel = {"probed": 24, "isolated": 9, "P1": 4, "JSD": found}
            survivors = Survivors(torch.randn(found, 160), [token] * found, funnel, 0.3, [])
            yield name, sha256(name.encode()).hexdigest(), survivors

    settings = replace(preset("miniature"), min_image_fraction=0.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    build(model, processor, source, out, model_id="miniature", settings=settings, engine=pretend)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"images": count, "before_mib": round(before), "peak_mib": round(after),
                      "kib_per_image": round((after - before) * 1024 / count, 2)}))  # fmt: skip


def clustered(count: int, d: int = 1024) -> torch.Tensor:
    """Synthetic survivors, (count, d) float32: 200 clusters, some five times as wide as others."""
    generator = torch.Generator().manual_seed(SEED)
    centres = 4 * torch.randn(200, d, generator=generator)
    x = torch.empty(count, d)
    for part in x.split(10_000):
        which = torch.randint(0, 200, (len(part),), generator=generator)
        part.copy_(centres[which] + (0.3 + which[:, None] / 166) * torch.randn(part.shape, generator=generator))
    return x


def points(count: int) -> None:
    """Cluster synthetic survivors; prints seconds and the peak memory, including the points' own."""
    x = clustered(count)
    start, busy = time.perf_counter(), time.process_time()
    labels = dpc_knn(x, 64)
    print(json.dumps({
        "points": count, "seconds": round(time.perf_counter() - start, 1),
        "cpu": round(time.process_time() - busy, 1), "clusters": len(set(labels.tolist())),
        "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }))  # fmt: skip


def scenes(folder: Path, count: int) -> Path:
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(scene("train", 2, SEED, i).pixels).save(images / f"{i:06d}.png")
    return images


def key(row: dict) -> tuple:
    return row["image"], row["row"], row["col"], row["cluster"]


def run(*arguments: object) -> dict:
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
