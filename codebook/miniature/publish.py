"""Measure a trained miniature on the held-out split and put it, with its model card, where it ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from codebook.miniature import FAMILIES, FOLDER, model
from codebook.miniature.train import evaluate

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The miniature

A small LLaVA (`LlavaForConditionalGeneration`, {parameters:.2f} M parameters, 144 visual tokens) trained from
scratch on procedural scenes, to measure visual-token pruning on any machine. It knows coloured shapes and
handwritten numbers, and nothing else: it is an instrument, not an assistant. Recipe and task families:
`docs/miniature.md`.

Held-out questions, {count} a family, greedy decoding. "No image" has the image left out of the prompt: what
the questions alone give away. box: intersection over union of at least 0.5; cap: F1 over the phrases; the
rest: exact answer.

| | {heads} | mean |
|---|{rule}---|
| full | {seeing} |
| no image | {blind} |

Trained by `{command}` (seed {seed}): {time}.
Stored in float16, to be computed in float32, which is what config.json says.

{note}
"""


def publish(run: Path, *, command: str, time: str, count: int = 500, note: str = "") -> dict[str, float]:
    """Evaluate ``run/weights``, write its README.md, and copy the folder to the package.

    Parameters
    ----------
    run : the folder given to `train`
    command, time : how the weights were made and how long that took, for the card
    count : held-out questions a family

    Returns
    -------
    dict : mean score of each family, from the image
    """
    built, processor = model.load(run / "weights")
    seeing = evaluate(built, processor, count=count)
    blind = evaluate(built, processor, count=count, visual=False)
    seed = json.loads((run / "recipe.json").read_text())["seed"]
    card = CARD.format(
        parameters=built.num_parameters() / 1e6,
        count=count,
        heads=" | ".join(FAMILIES),
        rule="---|" * len(FAMILIES),
        seeing=_row(seeing),
        blind=_row(blind),
        command=command,
        seed=seed,
        time=time,
        note=note,
    )
    (run / "weights" / "README.md").write_text(card.rstrip() + "\n")
    FOLDER.mkdir(exist_ok=True)
    for file in (run / "weights").iterdir():
        shutil.copyfile(file, FOLDER / file.name)
    return seeing


def _row(means: dict[str, float]) -> str:
    values = [*means.values(), sum(means.values()) / len(means)]
    return " | ".join(f"{100 * value:.1f}" for value in values)
