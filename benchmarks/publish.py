"""Measure a trained miniature on held-out questions and put it, with its model card, where it ships.

python benchmarks/publish.py runs/miniature --command "..." --time "..."
"""

import argparse
import json
import shutil
from pathlib import Path

from codebook.evaluation import score, table
from codebook.miniature import FAMILIES, FOLDER, model, tasks
from codebook.miniature.scenes import LOOKS

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of `codebook miniature train --out`")
    parser.add_argument("--command", required=True, help="that made the weights")
    parser.add_argument("--time", required=True, help="that it took, and on what machine")
    parser.add_argument("--count", type=int, default=1000, help="held-out questions a family")
    options = parser.parse_args()
    weights = options.run / "weights"
    built, processor = model.load(weights)
    rows = {}
    for look in LOOKS:
        asked = [q for family in FAMILIES for q in tasks(family, "test", 0, options.count, look=look)]
        rows["full" if look == "plain" else look] = score(built, processor, asked)
        if look == "plain":
            rows["no image"] = score(built, processor, asked, blind=True)
        print(table(rows), flush=True)
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
