"""Measure a trained miniature on held-out questions and put it, with its model card, where it ships.

    python -m benchmarks.publish.publish runs/miniature --command "..." --time "..."

Answers are kept in the run's folder: the command can be stopped and run again.
"""

import argparse
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from codebook.cli.output import progress
from codebook.evaluation import Scores, TaskScores, accuracy_table, compare, mean
from codebook.miniature import TASK_FAMILIES, tasks
from codebook.miniature.model import load_weights
from codebook.miniature.samples import of_questions
from codebook.miniature.scenes import LOOKS
from codebook.models.loading import SHIPPED_MODELS

BLIND = "no image"
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The miniature

A small LLaVA (`LlavaForConditionalGeneration`, {parameters:.2f} M parameters, 144 visual tokens an image) trained from
scratch on procedural scenes, to measure visual-token pruning on any machine. It knows coloured shapes and handwritten
numbers, and nothing else: it is an instrument, not an assistant. Recipe and task families: `docs/miniature.md`.

Percent of {count} held-out questions a family ({others} for each other look), greedy decoding. "no image" has the
images left out of the prompt: what the questions alone give away; "photo", "noise" and "scale" are looks that training
never showed. box: intersection over union of at least 0.5; cap: F1 over the phrases; the rest: exact answer.

{table}

Trained by `{command}` (seed {seed}): {time}.
Stored in float16, to be computed in float32, which is what config.json says.
"""


Job = tuple[Path, str, str, str, int]


def ask(job: Job) -> Scores:
    """Scores of one family and look, on one thread: two such processes beat one of two threads."""
    run, name, family, look, count = job
    torch.set_num_threads(1)
    built, processor = load_weights(run / "weights")
    samples, file = (
        of_questions(tasks(family, "test", 0, count, look=look)),
        run / "answers" / f"{name}-{family}.sqlite",
    )
    [scores] = compare(built, processor, samples, {name: lambda asked: None}, file, blind=name == BLIND).values()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of `codebook miniature train --out`")
    parser.add_argument("--command", required=True, help="that made the weights")
    parser.add_argument("--time", required=True, help="that it took, and on what machine")
    parser.add_argument("--count", type=int, default=1000, help="held-out questions a family")
    parser.add_argument("--others", type=int, default=250, help="and of each other look")
    options = parser.parse_args()
    weights = options.run / "weights"
    built, _ = load_weights(weights)
    kinds = {"full": "plain", BLIND: "plain"} | {look: look for look in LOOKS if look != "plain"}
    counts = {name: options.count if look == "plain" else options.others for name, look in kinds.items()}
    jobs = [(options.run, name, f, look, counts[name]) for name, look in kinds.items() for f in reversed(TASK_FAMILIES)]
    rows: dict[str, Scores] = {name: {family: TaskScores() for family in TASK_FAMILIES} for name in kinds}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool, progress("ask", len(jobs), "parts") as tick:
        for i, (job, found) in enumerate(zip(jobs, pool.map(ask, jobs), strict=True), 1):
            rows[job[1]] |= found
            tick(i, f"{job[1]} {job[2]}: {mean(found):.3f}")
    print(accuracy_table(rows))
    card = CARD.format(
        parameters=built.num_parameters() / 1e6,
        count=options.count,
        others=options.others,
        table=accuracy_table(rows),
        command=options.command,
        seed=json.loads((options.run / "recipe.json").read_text())["seed"],
        time=options.time,
    )
    (weights / "README.md").write_text(card)
    for file in weights.iterdir():
        shutil.copyfile(file, SHIPPED_MODELS["miniature"] / file.name)


if __name__ == "__main__":
    main()
