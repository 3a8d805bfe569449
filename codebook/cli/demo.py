"""The main job on the embedded model: build a codebook, prune with it, and compare at equal budgets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codebook.cli.options import JsonOption, SeedOption
from codebook.cli.output import Update, building_progress, progress, resumable, write_picture
from codebook.errors import unknown

if TYPE_CHECKING:
    from codebook.evaluation import Scores
    from codebook.pruning import Pruner, Schedule

BUDGETS = (0.5, 0.25, 0.11)
"""Fractions of the visual tokens kept, averaged over the layers."""


@resumable()
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for images, codebook and picture.")] = Path("codebook-demo"),
    images: Annotated[int, typer.Option(min=1, help="Training images to build from.")] = 100,
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions per task family.")] = 40,
    name: Annotated[
        str, typer.Option("--model", help="`miniature`, or `eyes`, which takes about forty times as long.")
    ] = "miniature",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Build a codebook and compare methods on held-out questions.

    The model ships with the package; nothing is fetched. About four minutes on two cores.
    """
    from codebook import miniature, models
    from codebook.building import build
    from codebook.cli.checks import check_output_folder
    from codebook.evaluation import evaluate, mean, standard_error, task_means
    from codebook.inference.ask import ask
    from codebook.inference.overlay import overlay
    from codebook.miniature.samples import of_miniature
    from codebook.pruning import Random, RedundancyCodebook, Schedule, SeededFarthestPoint, Stage, Uniform
    from codebook.pruning.presets import DEFAULT

    check_output_folder(out, ("kept.png",))
    if name not in models.SHIPPED_MODELS:
        raise unknown("no model ships as", name, models.SHIPPED_MODELS)
    model, processor = models.load(name)
    folder = out / f"images-{images}-{seed}"
    miniature.write_images(folder, images, seed=seed)
    with building_progress() as tick:
        target = out / f"codebook-{images}-{seed}{'' if name == 'miniature' else '-' + name}"
        book = build(model, processor, folder, target, model_id=name, progress=tick)

    pruners: dict[str, tuple[Pruner, bool]] = {
        DEFAULT: (SeededFarthestPoint(book, middle=True), True),
        "codebook": (RedundancyCodebook(book), False),
        "random": (Random(seed), False),
        "uniform": (Uniform(), False),
    }
    samples = of_miniature("test", seed, questions)
    plans: dict[tuple[str, float], Schedule | None] = {("unpruned", 1.0): None}
    plans |= {(name, k): Schedule([Stage(0, k, *way)]) for k in BUDGETS for name, way in pruners.items()}
    results: dict[tuple[str, float], Scores] = {}
    with progress("answer", len(plans) * len(samples), "questions") as tick:
        for i, ((name, k), schedule) in enumerate(plans.items()):
            answered = partial(_answered, tick, i * len(samples), f"{name} at keep {k}")
            results[name, k] = evaluate(model, processor, samples, schedule, answered)

    picture = out / "kept.png"
    grid = models.family(model).grid(model)
    example = next(q for q in samples if q.task == "ocr")
    keep = 0.25
    [answer] = ask(model, processor, [example.pictures()], [example.question], plans[DEFAULT, keep])
    write_picture(overlay(example.pictures()[0], answer.kept[0], grid), picture)
    report = {
        "questions": len(samples),
        "prototypes": len(book.prototypes),
        "accuracy": [
            {"method": name, "keep": k, "mean": mean(scores), "standard_error": standard_error(scores),
             "families": task_means(scores)}
            for (name, k), scores in results.items()
        ],
        "picture": str(picture),
        "example": {"question": example.question, "answer": answer.text, "truth": example.answer,
                    "kept": len(answer.kept[0]), "tokens": grid[0] * grid[1]},
    }  # fmt: skip
    if as_json:
        print(json.dumps(report))
        return
    print(_comparison_table(results, list(pruners), len(samples)))
    print(f"\n{picture}: {example.question!r}, answered {answer.text!r} (truth: {example.answer!r}) from "
          f"{len(answer.kept[0])} of {grid[0] * grid[1]} visual tokens, framed")  # fmt: skip


def _answered(tick: Update, before: int, note: str, done: int) -> None:
    tick(before + done, note)


def _comparison_table(results: dict[tuple[str, float], Scores], methods: Sequence[str], count: int) -> str:
    """The comparison as plain text: one row per budget, one column per method."""
    from codebook.evaluation import mean_text

    full = results["unpruned", 1.0]
    cell = "{:>16}".format
    lines = [
        f"accuracy on {count} held-out questions, mean over {len(full)} task families (standard error)",
        "",
    ]
    lines.append("keep" + "".join(map(cell, methods)))
    show = [mean_text(full)] * len(methods)
    lines.append("1   " + "".join(map(cell, show)) + "   (unpruned)")
    for keep in BUDGETS:
        row = [results[name, keep] for name in methods]
        lines.append(f"{keep:<4}" + "".join(cell(mean_text(s)) for s in row))
    return "\n".join(lines)
