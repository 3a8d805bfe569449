"""`codebook tune`: from a model and images to a recipe: codebook, schedule, and how good they are."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codebook.cli.options import (
    DATA,
    FirstOption,
    ImagesOption,
    JsonOption,
    KeepOption,
    Loading,
    ModelOption,
    PilotOption,
    Probing,
    PromptOption,
    SecondsOption,
    SeedOption,
    SelectOption,
    with_groups,
)
from codebook.cli.output import note, progress, resumable, write_picture
from codebook.errors import CodebookError, counted

if TYPE_CHECKING:
    from codebook.inference.samples import Sample

FEWEST_QUESTIONS = 40
"""Fewest questions: half of them calibrate, the others measure."""
TUNE_PICTURES, TUNE_ANSWERS = "pictures", "answers.sqlite"
TUNE_QUESTIONS = ("questions-tune.jsonl", "questions-bench.jsonl")


@resumable()
@with_groups
def tune_command(
    model: ModelOption,
    images: ImagesOption,
    out: Annotated[Path, typer.Option(help="Folder of the recipe; run again to resume.")],
    probing: Probing,
    loading: Loading,
    data: Annotated[
        str | None,
        typer.Option(help=f"{DATA} Default: what each of some images shows, as the model itself says."),
    ] = None,
    keep: KeepOption = 0.2,
    first: FirstOption = None,
    count: Annotated[
        int, typer.Option(min=1, help="Questions per task to calibrate with, and as many to measure with.")
    ] = 50,
    pilot: PilotOption = None,
    select: SelectOption = None,
    prompt: PromptOption = None,
    seconds: SecondsOption = 20,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a recipe for a model: codebook, schedule and report.

    The schedule is the one that spends the budget best on some questions; the report measures it on others.
    """
    from codebook.analysis.calibration import check_sample_count
    from codebook.analysis.deep_stages import check_method
    from codebook.cli.bench import bench_command
    from codebook.cli.build import prepared_build
    from codebook.cli.calibrate import calibrate_command
    from codebook.cli.checks import check_output_folder
    from codebook.cli.data import is_miniature, load_samples
    from codebook.cli.horizon import horizon_command
    from codebook.cli.recipe import (
        BENCH_PART,
        CODEBOOK_PART,
        HORIZON_PART,
        RECIPE_PART,
        REPORT_PART,
        SCHEDULE_PART,
    )
    from codebook.inference.samples import mixed, samples_digest
    from codebook.pruning.presets import DEFAULT
    from codebook.pruning.stage import check_keep
    from codebook.store.files import write_text
    from codebook.store.horizons import carried_horizon, put_horizon
    from codebook.store.locks import writing

    check_keep(keep)
    for method in first or ():
        check_method(method)
    check_output_folder(out, (RECIPE_PART, REPORT_PART, SCHEDULE_PART))
    build = prepared_build(model, images, out / CODEBOOK_PART, probing, loading, {"prompt": prompt}, pilot, select)
    asked = {
        "format_version": 1, "model": model, "data": data, "keep": keep, "first": first or [], "count": count,
        "seed": seed,
    }  # fmt: skip
    _check_folder(out, asked)
    made = data is not None and is_miniature(data)
    if made:
        samples: Sequence[Sample] = load_samples(str(data), seed=seed, count=count)
        check_sample_count(mixed(samples, seed))
    else:
        samples = _samples(model, images, data, count, prompt, seed, loading, probing.strict)
    asked["questions"] = samples_digest(samples)  # a file may say others now than when its steps were made
    _check_folder(out, asked)
    metric = _rehearse(model, samples, keep, first or (), prompt, loading)
    common: dict[str, Any] = {"seed": seed, **vars(loading)}
    out.mkdir(parents=True, exist_ok=True)
    with writing(out, patience=0):
        _check_folder(out, asked)  # which another process may have begun meanwhile
        write_text(out / RECIPE_PART, json.dumps({**asked, "labels": None, "complete": False}, indent=1) + "\n")
        with contextlib.redirect_stdout(sys.stderr):  # what the steps say is on the way to a result, not the result
            note("tune 1/5: codebook")
            build(False)
            note("tune 2/5: questions and their answers")
            if made:
                labels, files = "given", [str(data)] * 2
            else:
                labels, files = _labelled(model, samples, out, count, loading)
            own = count if made else None  # files are taken whole
            note("tune 3/5: information horizon")
            if not (out / HORIZON_PART / "horizon.json").exists():
                horizon_command(model=model, data=files[0], out=out / HORIZON_PART, metric=metric, count=own, **common)
            put_horizon(out / CODEBOOK_PART, carried_horizon(out / HORIZON_PART, None))
            note("tune 4/5: schedule")
            if not (out / SCHEDULE_PART).exists():
                calibrate_command(
                    model=model, data=files[0], keep=keep, out=out / SCHEDULE_PART, method=DEFAULT, first=first,
                    count=own, codebook=out / CODEBOOK_PART, **common,
                )  # fmt: skip
            note("tune 5/5: bench")
            if not (out / BENCH_PART / "results.json").exists():
                bench_command(
                    model=model, methods=str(out / SCHEDULE_PART), out=out / BENCH_PART, data=[files[1]],
                    keep=str(keep), count=count, codebook=out / CODEBOOK_PART,
                    horizon=out / HORIZON_PART / "horizon.json", seconds=seconds, seeds=1, **common,
                )  # fmt: skip
        report = _report(out, {**asked, "labels": labels})
        write_text(out / REPORT_PART, report)
        write_text(out / RECIPE_PART, json.dumps({**asked, "labels": labels, "complete": True}, indent=1) + "\n")
    print(json.dumps({"folder": str(out), **asked, "labels": labels}) if as_json else report)
    note(f"use it: codebook prune {model} --recipe {out} --image FILE --ask TEXT")


def _check_folder(out: Path, asked: dict[str, Any]) -> None:
    """Refuse a folder with something else in it than this very recipe."""
    from codebook.cli.recipe import RECIPE_PART, read_recipe

    if (out / RECIPE_PART).exists():
        before = {"first": []} | read_recipe(out)
        if different := [name for name, value in asked.items() if before.get(name, value) != value]:
            raise CodebookError(f"{out} holds another recipe (different {', '.join(different)}): choose another --out")
    elif out.is_dir() and any(out.iterdir()):
        raise CodebookError(f"{out} is not empty and holds no recipe: choose another --out")


def _samples(
    model: str,
    images: Path,
    data: str | None,
    count: int,
    prompt: str | None,
    seed: int,
    loading: Loading,
    strict: bool,
) -> Sequence[Sample]:
    """The questions, those of `data` or the probes' own about some of the images."""
    from codebook.analysis.calibration import check_sample_count
    from codebook.cli.data import load_samples
    from codebook.inference.samples import mixed

    if data is None:
        samples = image_questions(model, images, count, prompt, seed, strict)
    else:
        samples = load_samples(data, loading.frame_rule(model))
    usable = sum(min(n, 2 * count) for n in Counter(sample.task for sample in samples).values())
    if usable < FEWEST_QUESTIONS:
        raise CodebookError(
            f"{counted(usable, 'question')} cannot tune: give {FEWEST_QUESTIONS} images, or more --data, and a "
            f"--count of {FEWEST_QUESTIONS // 2} at least"
        )
    check_sample_count(mixed([samples[row] for row in _two_halves(samples, count)[0]], seed))
    return samples


def _rehearse(
    model: str, samples: Sequence[Sample], keep: float, first: Sequence[str], prompt: str | None, loading: Loading
) -> str:
    """Refuse, before the long first step, what a later one would; returns the metric to find the horizon by."""
    from codebook import models
    from codebook.analysis import plot
    from codebook.analysis.calibration import check_schedules
    from codebook.analysis.deep_stages import candidate_schedules
    from codebook.analysis.layer_sweep import check_tasks
    from codebook.analysis.prefill import Prefill, UnsharedError
    from codebook.inference.prompts import check_question, check_samples, prepare_samples
    from codebook.pruning import Schedule
    from codebook.pruning.presets import needs_codebook

    plot.require_matplotlib()
    check_tasks(sample.task for sample in samples)
    loaded, processor = loading.load(model)
    check_samples(loaded, processor, samples)
    if prompt is not None:
        check_question(loaded, processor, prompt)
    size = models.shape(loaded)
    # Any one method before the LLM reaches the budgets that the default one does, which needs the codebook to come.
    Schedule.solve("random", keep=keep, n=size.tokens, layers=size.layers)
    for method in first:
        if not needs_codebook(method):
            alone, deeper = candidate_schedules(loaded, method, keep)
            check_schedules(loaded, processor, samples, [alone, *deeper])
    longest = max(samples, key=lambda sample: len(sample.images))
    try:
        Prefill.of(loaded, prepare_samples(loaded, processor, [longest]).inputs)
    except UnsharedError:
        return "generated"
    return "probability"


def _labelled(model: str, samples: Sequence[Sample], out: Path, count: int, loading: Loading) -> tuple[str, list[str]]:
    """Whose the labels are, and files of the questions to calibrate and to measure with, all of them with answers."""
    from codebook.inference.respond import respond
    from codebook.inference.samples import image_numbers
    from codebook.store.files import write_text

    files = [out / name for name in TUNE_QUESTIONS]
    open_ones = [sample for sample in samples if sample.answer is None]
    labels = "own" if len(open_ones) == len(samples) else "mixed" if open_ones else "given"
    if all(file.exists() for file in files):
        return labels, [str(file) for file in files]
    texts: dict[int, str] = {}
    if open_ones:
        loaded, processor = loading.load(model)
        with progress("answers of the unpruned model", len(open_ones), "answers") as tick:
            [found] = respond(
                loaded, processor, open_ones, {"unpruned": lambda group: None}, out / TUNE_ANSWERS, tick
            ).values()
        texts = {id(sample): one.text for sample, one in zip(open_ones, found, strict=True)}
    answered = [
        (i, sample, text)
        for i, sample in enumerate(samples)
        if (text := texts.get(id(sample), sample.answer)) and text.strip()
    ]
    numbers = image_numbers(samples)
    for file, half in zip(files, _two_halves([sample for _, sample, _ in answered], count), strict=True):
        lines = []
        for i, sample, text in (answered[row] for row in half):
            answers = list(sample.answers) or [text]
            record = {"images": _paths(out, numbers[i], sample), "question": sample.question, "answers": answers}
            lines.append(json.dumps({**record, "task": sample.task}) + "\n")
        write_text(file, "".join(lines))
    return labels, [str(file) for file in files]


def _two_halves(samples: Sequence[Sample], count: int) -> tuple[list[int], list[int]]:
    """Rows of the samples to calibrate and to measure with: of each task in turns, and at most `count` for each.

    No image is in both: what was chosen by questions about it is not measured by others.
    """
    from codebook.inference.samples import image_groups

    halves: tuple[list[int], list[int]] = [], []
    seen = Counter[str](), Counter[str]()
    for rows in image_groups(samples):
        task = samples[rows[0]].task
        half = int(seen[0][task] > seen[1][task])
        for row in rows:
            if seen[half][samples[row].task] < count:
                halves[half].append(row)
                seen[half][samples[row].task] += 1
    return sorted(halves[0]), sorted(halves[1])


def image_questions(
    model: str, images: Path, count: int, prompt: str | None, seed: int, strict: bool
) -> Sequence[Sample]:
    """The question of a build's probes, about a random sample of the images; of those that can be read, as a build."""
    from codebook import building
    from codebook.building.pilot import shuffled
    from codebook.inference.samples import Sample

    source = building.open_images(images)
    question = prompt or (building.published(model) or building.Settings()).prompt
    found: list[Sample] = []
    for name in shuffled(source.names, seed):
        if len(found) == 2 * count:
            break
        try:
            found.append(Sample((source.read(name),), question))
        except (CodebookError, OSError):
            if strict:
                raise
            note(f"skipped unreadable image: {name}")
    return found


def _paths(out: Path, number: int, sample: Sample) -> list[str]:
    """Files of a sample's pictures; those that are in memory only are written."""
    paths = []
    for i, picture in enumerate(sample.images):
        path = picture if isinstance(picture, Path) else out / TUNE_PICTURES / f"{number:05d}-{i}.png"
        if not isinstance(picture, Path):
            path.parent.mkdir(exist_ok=True)
            write_picture(sample.pictures()[i], path)
        paths.append(str(path.absolute()))
    return paths


def _report(out: Path, asked: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    from codebook.cli.recipe import BENCH_PART, CODEBOOK_PART, HORIZON_PART, SCHEDULE_PART
    from codebook.evaluation.report import markdown
    from codebook.store.folder import read_config

    config = read_config(out / CODEBOOK_PART)
    found = json.loads((out / SCHEDULE_PART).read_text())["calibration"]
    results = json.loads((out / BENCH_PART / "results.json").read_text())
    labels = {
        "given": "The answers are those of the questions.",
        "own": "No answers were given: the unpruned model's own are the labels. So the figures say how far pruning "
        "changes its answers, not how right they are.",
        "mixed": "Where no answer was given, the unpruned model's own is the label.",
    }
    seen = " The questions are about images of which the codebook was made: of others it may say less."
    lines = [
        f"# Recipe for {asked['model']}, keep {asked['keep']:g}", "",
        f"- Codebook: {config['prototypes']} prototypes from {config['images']['used']} images (`{CODEBOOK_PART}`).",
        f"- Schedule: `{found['schedule']}` (`{SCHEDULE_PART}`): {found['result']}.",
        f"- Horizon: `{HORIZON_PART}/horizon.json`; bench: `{BENCH_PART}/report.html`.",
        f"- {labels[asked['labels']]}{seen if asked['data'] is None else ''}",
        "", markdown(results), "",
        f"Use: `codebook prune {asked['model']} --recipe DIR --image FILE --ask TEXT`. Share: "
        f"`codebook push DIR/{CODEBOOK_PART} OWNER/NAME --bench DIR/{BENCH_PART}/results.json`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
