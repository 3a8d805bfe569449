"""Smaller `eyes` of other seeds, trained on a processor, and where their information horizon lies.

    python -m benchmarks.experiments.eyes_seeds --out runs/seeds --seeds 1 2

Each is trained in 2 scenes a step, then asked questions of three families about held-out scenes, and the sweep of
`codebook horizon` is printed. Run again, a training goes on where it was stopped.
"""

import argparse
from pathlib import Path

from codebook import load
from codebook.analysis import horizons, sweep
from codebook.analysis.horizon import horizon_table
from codebook.cli.output import progress
from codebook.miniature.eyes_training import train_eyes
from codebook.miniature.samples import of_miniature
from codebook.models.smollm2 import language_file

FAMILIES = ("attr", "word", "ocr")
"""What so short a training teaches well enough to ask where it is read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder per seed is made in it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=170, help="of 2 scenes each: 26 minutes of one core for 170")
    parser.add_argument("--count", type=int, default=30, help="held-out questions a family")
    options = parser.parse_args()
    for seed in options.seeds:
        out, language = options.out / str(seed), language_file(None)
        # A look at held-out questions is as dear as some steps, so there are few of them.
        options_of_run = {"rows": 2, "steps": options.steps, "warm": 10, "seed": seed}
        weights = train_eyes(out, language, device="cpu", makers=1, count=0, every=2000.0, **options_of_run)
        model, processor = load(str(weights))
        samples = of_miniature("test", 0, options.count, FAMILIES)
        with progress(f"seed {seed}", len(samples), "samples") as tick:
            swept, _ = sweep(model, processor, samples, done=tick)
        found = horizons(swept)
        print(f"seed {seed}\n{horizon_table(found, swept.layers)}")
        for task, one in found.items():
            print(task, "never", round(100 * one.full), "none from layer", [round(100 * float(p)) for p in one.pruned])


if __name__ == "__main__":
    main()
