"""Measure a trained miniature on held-out questions and put it, with its model card, where it ships.

python benchmarks/publish.py runs/miniature --command "..." --time "..."
"""

import argparse
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from codebook.evaluation import Scores, mean, score, table
from codebook.miniature import FAMILIES, FOLDER, model, tasks
from codebook.miniature.scenes import LOOKS
from codebook.progress import progress

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The miniature

A small LLaVA (`LlavaForConditionalGeneration`, {parameters:.2f} M parameters, 144 visual tokens an image) trained from
scratch on procedural scenes, to measure visual-token pruning on any machine. It knows coloured shapes and handwritten
numbers, and nothing else: it is an instrument, not an assistant. Recipe and task families: `docs/miniature.md`.

Percent of {count} held-out questions a family, greedy decoding. "no image" has the images left out of the prompt: what
the questions alone give away; "photo", "noise" and "scale" are looks that training never showed. box: intersection over
union of at least 0.5; cap: F1 over the phrases; the rest: exact answer.

{table}

Trained by `{command}` (seed {seed}): {time}. Stored in float16, to be computed in float32, which is what config.json
says.
"""


def ask(job: tuple[Path, str, str, bool, int]) -> Scores:
    """Scores of one family and look, on one thread: two such processes beat one of two threads."""
    weights, family, look, blind, count = job
    torch.set_num_threads(1)
    built, processor = model.load(weights)
    return score(built, processor, list(tasks(family, "test", 0, count, look=look)), blind=blind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of `codebook miniature train --out`")
    parser.add_argument("--command", required=True, help="that made the weights")
    parser.add_argument("--time", required=True, help="that it took, and on what machine")
    parser.add_argument("--count", type=int, default=1000, help="held-out questions a family")
    options = parser.parse_args()
    weights = options.run / "weights"
    built, _ = model.load(weights)
    kinds = [("full" if look == "plain" else look, look, False) for look in LOOKS]
    kinds.insert(1, ("no image", "plain", True))
    jobs = [(weights, family, look, blind, options.count) for _, look, blind in kinds for family in FAMILIES]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool, progress("ask", len(jobs), "parts") as tick:
        scores = []
        for job, found in zip(jobs, pool.map(ask, jobs), strict=True):
            scores.append(found)
            tick(len(scores), f"{job[1]}: {mean(found):.3f}")
    rows: dict[str, Scores] = {}
    for i, (name, _, _) in enumerate(kinds):
        rows[name] = {f: x for part in scores[i * len(FAMILIES) : (i + 1) * len(FAMILIES)] for f, x in part.items()}
    print(table(rows))
    card = CARD.format(
        parameters=built.num_parameters() / 1e6,
        count=options.count,
        table=table(rows),
        command=options.command,
        seed=json.loads((options.run / "recipe.json").read_text())["seed"],
        time=options.time,
    )
    (weights / "README.md").write_text(card)
    for file in weights.iterdir():
        shutil.copyfile(file, FOLDER / file.name)


if __name__ == "__main__":
    main()
