"""What the commands of `codebook.cli` do once their options are parsed. Imports torch: keep it out of start-up."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from codebook import building, models
from codebook.cli.output import building_progress, note, progress
from codebook.errors import CodebookError
from codebook.inference.ask import Answer, ask
from codebook.inference.overlay import overlay
from codebook.pruning import METHODS, RedundancyCodebook, Schedule, Stage, VisualTokens, presets
from codebook.pruning.plan import DTYPES, Plan, find_codebook
from codebook.pruning.stage import check_keep
from codebook.pruning.text import WITH_MASS
from codebook.store.codebook import Codebook
from codebook.store.files import replacing
from codebook.store.pictures import read_image
from codebook.store.shipped import folders


@dataclass(frozen=True)
class Probing:
    """How the command line says where and how images are probed."""

    limit: int | None = None
    strict: bool = False
    batch: int | None = None
    device: str | None = None
    dtype: str | None = None
    exhaustive: bool = False
    engine: str = "local"
    address: str | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        if self.engine not in ("local", "ray"):
            raise CodebookError(f"no engine {self.engine!r}: use local or ray")
        if self.dtype not in (None, *DTYPES):
            raise CodebookError(f"no dtype {self.dtype!r}: use {', '.join(DTYPES)}")

    def load(self, name: str) -> tuple[Any, Any]:
        return models.load(name, self.device, None if self.dtype is None else getattr(torch, self.dtype))

    def options(self, name: str, images: Path, settings: building.Settings) -> dict[str, Any]:
        """For `building.build` and `building.extend`."""
        options: dict[str, Any] = {"batch_size": self.batch, "exhaustive": self.exhaustive}
        if self.engine == "ray":
            from codebook.building.builder import Worker
            from codebook.building.on_ray import ray_engine

            def make() -> Worker:
                source = building.open_images(images, self.limit)
                return Worker(*self.load(name), source, settings, building.Options(**options))

            gpus = 1 if (self.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda") else 0
            engine = ray_engine(make, self.workers, self.address, gpus)
            return options | {"strict": self.strict, "limit": self.limit, "engine": engine}
        return options | {"strict": self.strict, "limit": self.limit}


def build_codebook(
    name: str, images: Path, out: Path, preset: str | None, changes: dict[str, Any], how: Probing, as_json: bool
) -> None:
    settings = building.preset(preset or name, **{k: v for k, v in changes.items() if v is not None})
    count = len(building.open_images(images, how.limit).stamps)  # before a model is loaded for nothing
    model, processor = how.load(name)
    with building_progress(count) as show:
        options = how.options(name, images, settings)
        book = building.build(
            model, processor, images, out, model_id=name, settings=settings, progress=show, **options
        )  # fmt: skip
    built(book, out, as_json)


def extend_codebook(folder: Path, images: Path, out: Path, how: Probing, as_json: bool) -> None:
    book, _ = building.Pool.load(folder)
    count = len(building.open_images(images, how.limit).stamps)
    model, processor = how.load(name := book.config["model"])
    with building_progress(count) as show:
        options = how.options(name, images, building.Settings(**book.config["settings"]))
        book = building.extend(model, processor, folder, images, out, progress=show, **options)
    built(book, out, as_json)


def merge_codebooks(first: Path, second: Path, out: Path, as_json: bool) -> None:
    built(building.merge(first, second, out), out, as_json)


def built(book: Codebook, out: Path, as_json: bool) -> None:
    """Say what a codebook holds, and which images it had to leave out."""
    used = book.config["images"]
    for skipped in used["skipped"]:
        note(f"skipped unreadable image: {skipped}")
    if as_json:
        print(json.dumps({"folder": str(out), "prototypes": len(book), "funnel": book.config["funnel"], **used}))
    else:
        print(f"{len(book)} prototypes from {used['used']} images in {out}")


def prune_image(
    name: str,
    plan: Plan,
    images: list[Path],
    question: str,
    show: Path | None,
    max_new_tokens: int,
    device: str | None,
    as_json: bool,
) -> None:
    pictures = [read_image(path) for path in images]
    model, processor = models.load(name, device)
    schedule = plan.apply(model)
    [answer] = ask(model, processor, [pictures], [question], schedule, max_new_tokens)
    report = describe(model, schedule) | {"answer": answer.text, "kept": answer.kept}
    if show is not None:
        for i, (picture, image, kept) in enumerate(zip(pictures, answer.images, answer.kept, strict=True)):
            path = show if i == 0 else show.with_stem(f"{show.stem}-{i + 1}")
            with replacing(path) as temporary:
                overlay(picture, *image.view(kept)).save(temporary, format="PNG")
        report["picture"] = str(show)
    if as_json:
        print(json.dumps(report))
        return
    print(answer.text)
    note(summary(report, [len(kept) for kept in answer.kept]))
    if show is not None:
        note(f"picture: {show}")


def describe(model: Any, schedule: Schedule) -> dict[str, Any]:
    """A schedule and what it costs on a model, for one image: tokens per layer, their average, FLOPs, KV cache.

    Of a schedule under which images keep different numbers of tokens, only its text.
    """
    rows, cols = models.family(model).grid(model)
    text, n = model.config.get_text_config(), rows * cols
    report: dict[str, Any] = {"schedule": str(schedule), "tokens": n}
    if schedule.varies:
        return report
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    shape = {"layers": layers, "hidden": text.hidden_size, "intermediate": text.intermediate_size}
    cache = {
        "layers": layers,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "bytes": model.dtype.itemsize,
    }
    return report | {
        "counts": schedule.counts(n, layers),
        "keep": schedule.budget(n, layers),
        "flops": 1 - schedule.flops_reduction(n, **shape),
        "kv_bytes": schedule.kv_bytes(n, **cache),
    }


def summary(report: dict[str, Any], kept: list[int]) -> str:
    """A report of `describe` in one line, with what images kept of their own if there are some."""
    n = report["tokens"]
    if "counts" not in report:
        numbers = f"kept {', '.join(map(str, kept))}" if kept else "images keep numbers of their own"
        return f"schedule {report['schedule']}: {numbers} of {n} visual tokens"
    runs: list[str] = []
    start = 0
    for count, group in groupby(report["counts"]):
        end = start + len(list(group))
        of = "" if runs else f" of {n} visual tokens"
        runs.append(f"{count}{of} in layers {start}-{end - 1}")
        start = end
    cost = f"{report['flops']:.1%} of their prefill FLOPs, {report['kv_bytes'] / 1024:.0f} KiB of KV cache an image"
    return f"schedule {report['schedule']}: {', '.join(runs)}; averaged {report['keep']:.1%}; {cost}"


def prune_file(
    name: str,
    plan: Plan,
    source: Path,
    output: Path,
    batch: int,
    max_new_tokens: int,
    strict: bool,
    device: str | None,
    as_json: bool,
) -> None:
    tasks = list(read_questions(source))
    model, processor = models.load(name, device)
    schedule = plan.apply(model)
    failed = []
    with (
        replacing(output) as temporary,
        temporary.open("w") as out,
        progress("prune", len(tasks), "questions") as tick,
    ):
        for start in range(0, len(tasks), batch):
            group, pictures = tasks[start : start + batch], []
            errors: list[str | None] = []
            for task in group:
                try:
                    pictures.append([read_image(source.parent / image) for image in task["images"]])
                    errors.append(None)
                except CodebookError as error:
                    if strict:
                        raise
                    errors.append(str(error))
            questions = [task["question"] for task, error in zip(group, errors, strict=True) if error is None]
            answers: Iterator[Answer] = iter(
                ask(model, processor, pictures, questions, schedule, max_new_tokens) if questions else []
            )
            for task, wrong in zip(group, errors, strict=True):
                record = {k: v for k, v in task.items() if k != "images"}
                if wrong is None:
                    answer = next(answers)
                    record |= {"answer": answer.text, "kept": [len(kept) for kept in answer.kept]}
                else:
                    failed.append(wrong)
                    record["error"] = wrong
                out.write(json.dumps(record) + "\n")
            tick(start + len(group))
    for wrong in failed:
        note(f"skipped: {wrong}")
    report = describe(model, schedule) | {
        "questions": len(tasks),
        "failed": len(failed),
        "output": str(output),
    }
    if as_json:
        print(json.dumps(report))
    else:
        print(f"{len(tasks) - len(failed)} answers in {output}, {len(failed)} skipped")
        note(summary(report, []))


def read_questions(source: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file, each with `images` (paths) and `question`, all of them checked first."""
    try:
        lines = source.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CodebookError(f"cannot read {source}: {error}; give a JSONL file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            images = record["images"] if "images" in record else [record["image"]]
            question = record["question"]
            good = images and all(isinstance(image, str) for image in images) and isinstance(question, str)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise CodebookError(f'{source}, line {number}: write {{"image": "file.png", "question": "..."}}')
        yield record | {"images": images}


def prune_tokens(source: Path, folder: Path, keep: float, output: Path, as_json: bool) -> None:
    check_keep(keep)
    pruner = RedundancyCodebook(Codebook.load(folder))
    try:
        with safe_open(source, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CodebookError(f"no such file: {source}") from None
    except SafetensorError as error:
        raise CodebookError(f"cannot read {source}: {error}; give a safetensors file") from None
    kept: dict[str, Any] = {}
    report = {}
    dimension = pruner.codebook.prototypes.shape[1]
    for name, tokens in tensors.items():
        if tokens.dim() != 2 or not tokens.is_floating_point() or tokens.shape[1] != dimension or not len(tokens):
            raise CodebookError(
                f"tensor {name!r} of {source} is {tuple(tokens.shape)}: this codebook prunes floats of (n, {dimension})"
            )
        index = pruner.select(VisualTokens.of(tokens), Stage(0, keep, pruner).count(len(tokens)))
        kept |= {name: tokens[index].contiguous(), f"{name}.index": index}
        report[name] = {"tokens": len(tokens), "kept": len(index)}
    with replacing(output) as temporary:
        save_file(kept, temporary)
    print(json.dumps(report) if as_json else "\n".join(f"{n}: {r['kept']} of {r['tokens']}" for n, r in report.items()))


def list_all(as_json: bool) -> None:
    """Print the shipped codebooks, the methods, and the presets."""
    books = []
    for folder in folders():
        config = json.loads((folder / "config.json").read_text())
        books.append({"name": folder.name, "model": config["model"], "prototypes": config["prototypes"],
                      "dimension": config["dimension"], "folder": str(folder)})  # fmt: skip
    methods = sorted(METHODS)
    named = {name: f"{method}+mass" for name, method in WITH_MASS.items()} | presets.PRESETS
    if as_json:
        print(json.dumps({"codebooks": books, "methods": methods, "presets": named}, indent=1))
        return
    print("codebooks:")
    for book in books:
        print(
            f"  {book['name']}: {book['prototypes']} prototypes of dimension {book['dimension']}, in {book['folder']}"
        )
    print(f"methods, each also a preset, alone or as method+random, method+drop:\n  {', '.join(methods)}")
    print("presets, for 32 layers:")
    for name, text in named.items():
        print(f"  {name}: {text}")


def inspect(folder: Path, picture: Path | None, images: list[Path], as_json: bool) -> None:
    book = Codebook.load(folder)
    if picture is not None:
        draw_sheet(book, picture, images)
    clusters = Counter(record["cluster"] for record in book.provenance)
    report = {k: v for k, v in book.config.items() if k != "fingerprint"} | {
        "folder": str(folder),
        "clusters": [
            {
                "cluster": cluster,
                "prototypes": size,
                "images": len({r["image"] for r in book.provenance if r["cluster"] == cluster}),
            }
            for cluster, size in clusters.most_common()
        ],
    }
    if picture is not None:
        report["sheet"] = str(picture)
    if as_json:
        print(json.dumps(report))
        return
    for key, value in report.items():
        if key != "clusters":
            print(f"{key}: {json.dumps(value) if isinstance(value, dict) else value}")
    for row in report["clusters"]:
        print(f"cluster {row['cluster']}: {row['prototypes']} prototypes from {row['images']} images")


def draw_sheet(book: Codebook, picture: Path, images: list[Path]) -> None:
    """Write a picture of the tokens behind the prototypes."""
    from codebook.building.sheet import sheet

    if not images:
        raise CodebookError("--sheet needs --images: the images that the codebook came from")
    grid = book.config.get("grid")
    if grid is None:  # imported, or built by an early version
        grid = models.family(model := models.load(book.config["model"], "cpu")[0]).grid(model)
    title = f"{len(book)} prototypes for {book.config['model']}: tokens that change no answer, and recur"
    drawn = sheet(book.provenance, tuple(grid), [building.open_images(path) for path in images], title)
    with replacing(picture) as temporary:
        drawn.save(temporary, format="PNG")


def evaluate_miniature(
    folder: Path | None, count: int, looks: list[str], check: Path | None, device: str, as_json: bool
) -> None:
    from codebook.evaluation import Scores, compare, score, standard_error, table, task_means
    from codebook.miniature import FAMILIES, FOLDER, model, tasks
    from codebook.miniature import check as instrument
    from codebook.miniature.samples import of_miniature, of_questions

    loaded, processor = model.load(folder or FOLDER, device)
    rows: dict[str, Scores] = {}
    if check is not None:
        plans = instrument.plans(len(loaded.get_decoder().layers))
        samples = of_miniature("test", 0, count)
        with progress("check", len(plans) * len(samples), "answers") as tick:
            rows = compare(loaded, processor, samples, plans, check, tick)
    else:
        kinds = [(look, look, False) for look in looks] + [("no image", looks[0], True)]
        with progress("evaluate", len(kinds) * len(FAMILIES), "families") as tick:
            for name, look, blind in kinds:
                rows[name] = {}
                for family in FAMILIES:
                    asked = of_questions(tasks(family, "test", 0, count, look=look))
                    rows[name] |= score(loaded, processor, asked, blind=blind)
                    tick(sum(map(len, rows.values())), f"{name}: {family}")
    if as_json:
        means = {name: task_means(scores) for name, scores in rows.items()}
        errors = {name: standard_error(scores) for name, scores in rows.items()}
        print(json.dumps({"questions_per_family": count, "accuracy": means, "standard_error_of_mean": errors}))
    else:
        print(table(rows))


def find_horizon(
    name: str,
    source: str,
    out: Path | None,
    metric: Any,
    eps: float,
    margin: int | None,
    count: int,
    split: str,
    seed: int,
    device: str | None,
    as_json: bool,
) -> None:
    from codebook.analysis import horizon, plot
    from codebook.cli.data import load_samples
    from codebook.inference.samples import mixed

    if metric not in get_args(horizon.Metric):
        raise CodebookError(f"no metric {metric!r}: choose one of {', '.join(get_args(horizon.Metric))}")
    samples = mixed(load_samples(source, split, seed, count), seed)
    if out is not None:
        plot.check()  # before the long work
    model, processor = models.load(name, device)
    journal = None if out is None else out / ("generated.jsonl" if metric == "generated" else "first-token.jsonl")
    with progress("horizon", len(samples), "samples") as tick:
        sweep, cost = horizon.sweep(model, processor, samples, metric, journal, tick)
    found = horizon.horizons(sweep, eps, margin=margin, seed=seed)
    report = {
        "model": name, "data": source, "samples": len(samples), "labelled": sum(s.answer is not None for s in samples),
        "layers": sweep.layers, "start": sweep.start, "metric": metric, "eps": eps, "level": horizon.LEVEL,
        "horizons": {task: asdict(one) for task, one in found.items()}, "cost": asdict(cost),
    }  # fmt: skip
    if out is not None:
        with replacing(out / "horizon.png") as temporary:
            plot.draw(found, sweep.start, metric, temporary)
        with replacing(out / "horizon.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
    if as_json:
        print(json.dumps(report))
        return
    print(horizon.table(found, sweep.layers))
    if cost.naive:
        note(f"cost: {cost.processed / cost.naive:.1%} of the tokens of a pruned forward for each layer")
    if out is not None:
        note(f"curves: {out / 'horizon.png'}, {out / 'horizon.json'}")


def calibrate_schedule(
    name: str,
    plan: Plan,
    first: Sequence[str],
    source: str,
    out: Path,
    drop: bool,
    count: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Calibrate a plan's method; `first` are methods that may take its place as the first stage."""
    from codebook.analysis import calibration
    from codebook.cli.data import load_samples

    if out.suffix != ".json":
        raise CodebookError(f"{out} would not be read as a schedule: name a .json file")
    if not out.parent.is_dir():
        raise CodebookError(f"no folder {out.parent}: create it first")
    samples = load_samples(source, "train", plan.seed, count)
    model, processor = models.load(name, device)
    make = plan.maker(functools.cache(lambda: find_codebook(model, plan.codebook)))
    assert plan.keep is not None
    (plain, found), *others = (
        calibration.candidates(model, method, plan.keep, make, drop=drop) for method in (plan.schedule, *first)
    )
    found += [schedule for alone, deeper in others for schedule in (alone, *deeper)]
    journal = out.with_suffix(".journal.jsonl")
    with progress("calibrate", calibration.work(len(found), samples), "answers") as tick:
        result = calibration.calibrate(
            model, processor, samples, plain, found, seed=plan.seed, file=journal, done=tick
        )  # fmt: skip
    report = describe(model, result.schedule) | {"plain": str(plain), "data": source, "samples": len(samples)}
    report |= {"confirmed": result.confirmed, "result": str(result), **result.evidence()}
    with replacing(out) as temporary:
        result.schedule.save(temporary)
        temporary.write_text(json.dumps(json.loads(temporary.read_text()) | {"calibration": report}, indent=1) + "\n")
    journal.unlink(missing_ok=True)
    if as_json:
        print(json.dumps(report | {"output": str(out)}))
        return
    print(result)
    note(f"{out}: {summary(report, [])}")
