"""Every method on the miniature at equal budgets: the table of docs/methods-table.md.

    python benchmarks/methods.py --out methods.jsonl --count 1000

Held-out questions; each image is encoded once for all methods. Finished batches are kept in --out: the command can be
stopped and run again. Random is run with five seeds, and the spread is shown. A budget that a method cannot meet, since
layers before its first stage see all tokens, has no row.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from codebook import Codebook, Random, Schedule, Stage, load, models, prebuilt
from codebook.analysis.data import of_miniature
from codebook.errors import CodebookError
from codebook.evaluation import Plan, Scores, compare, mean, standard_error, table
from codebook.miniature.scenes import scene
from codebook.progress import progress
from codebook.pruning import METHODS
from codebook.pruning.methods.redundancy import RedundancyThreshold
from codebook.pruning.text import make, needs

KEEPS = (0.5, 0.25, 0.11)
SEEDS = range(5)
OWN = ("random", "drop", "codebook-threshold")  # rows of their own making
ROWS = (
    *(name for name in METHODS if name not in OWN),
    "codebook(scoring='double_softmax')", "feather", "pyramiddrop", "vtw", "seeded",
    "codebook+random", "divprune+random", "dart+random", "codebook+drop", "divprune+drop",
)  # fmt: skip


def plans(book: Codebook, n: int, layers: int, thresholds: dict[float, float]) -> dict[str, Plan]:
    """The rows by name, `unpruned` first."""

    def named(name: str):
        return METHODS[name](book) if needs(name) else make(name)

    schedules: dict[str, Schedule | None] = {"unpruned": None}
    for keep in KEEPS:
        for row in ROWS:
            try:
                schedules[f"{keep} {row}"] = Schedule.solve(row, named, n=n, layers=layers, keep=keep)
            except CodebookError as error:
                if "out of reach" not in str(error):
                    raise
        adaptive = RedundancyThreshold(book, threshold=thresholds[keep])
        schedules[f"{keep} codebook-threshold"] = Schedule([Stage(0, None, adaptive)])
        for seed in SEEDS:
            schedules[f"{keep} random, seed {seed}"] = Schedule([Stage(0, keep, Random(seed))])
    return {name: partial(_always, schedule) for name, schedule in schedules.items()}


def _always(schedule: Schedule | None, asked: object) -> Schedule | None:
    return schedule


def thresholds(model, processor, book: Codebook, images: int = 200) -> dict[float, float]:
    """For each budget the similarity to a prototype that this share of the tokens of training scenes is below."""
    pictures = [Image.fromarray(scene("train", 2, 0, i).pixels) for i in range(images)]
    pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        features = models.family(model).image_features(model, pixels)[0].flatten(0, 1)
        scores = book.redundancy(features)
    return {keep: float(scores.quantile(keep)) for keep in KEEPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a finished batch")
    parser.add_argument("--count", type=int, default=1000, help="held-out questions a family")
    options = parser.parse_args()
    model, processor = load("miniature")
    book = prebuilt(model)
    (rows, cols), layers = models.family(model).grid(model), len(model.get_decoder().layers)
    ways = plans(book, rows * cols, layers, thresholds(model, processor, book))
    questions = of_miniature("test", 0, options.count)
    with progress("answer", len(ways) * len(questions), "answers") as tick:
        results = compare(model, processor, questions, ways, options.out, tick)
    show(results)


def show(results: dict[str, Scores]) -> None:
    """One table a budget, the best first; random as the mean of its seeds with their spread."""
    for keep in KEEPS:
        own = {name.removeprefix(f"{keep} "): scores for name, scores in results.items() if name.startswith(f"{keep} ")}
        seeds = [own.pop(f"random, seed {seed}") for seed in SEEDS]
        pooled = {family: [x for scores in seeds for x in scores[family]] for family in seeds[0]}
        spread = statistics.stdev(map(mean, seeds))
        own[f"random, {len(seeds)} seeds (spread {100 * spread:.1f})"] = pooled
        ordered = dict(sorted(own.items(), key=lambda item: -mean(item[1])))
        print(f"\nkeep {keep}\n")
        print(table({"unpruned": results["unpruned"], **ordered}))
    full = results["unpruned"]
    print(f"\nunpruned {100 * mean(full):.1f} ± {100 * standard_error(full):.1f}")


if __name__ == "__main__":
    main()
