"""The command line: parse, call the library, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from codebook.errors import CodebookError

app = typer.Typer(
    name="codebook",
    help="Training-free visual-token pruning for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
miniature_app = typer.Typer(help="The embedded model: its training, its scenes.", no_args_is_help=True)
app.add_typer(miniature_app, name="miniature")

Model = Annotated[str, typer.Argument(help="`miniature`, a folder, or a name on the Hugging Face Hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda when there is one, else cpu.")]
Images = Annotated[
    Path, typer.Option(help="Folder of images, JSONL list, .tar shard or folder of them, or saved data set.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first images only.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Sequences a forward; default: found by itself.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: float32 on the CPU.")]
Engine = Annotated[str, typer.Option(help="Where images are probed: local, or ray.")]
Address = Annotated[str | None, typer.Option(help="Of a Ray cluster; default: one started here.")]
Workers = Annotated[int, typer.Option(min=1, help="Ray actors that hold the model.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Data = Annotated[
    str, typer.Option(help="`miniature`, or JSONL of {image | images, question, answer, task}, the last two optional.")
]
Count = Annotated[int, typer.Option(min=1, help="Samples of each task family, with --data miniature.")]


def main(argv: list[str] | None = None) -> None:
    """Run the command line; user errors are one line on stderr and exit code 2."""
    # Read when torch loads its OpenMP: waiting threads would otherwise spin, and starve whatever shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app(argv)
    except CodebookError as error:
        fail(str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            fail(f"cannot write {error.filename or 'output'}: {error.strerror}; free space or choose another folder")
        raise


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@app.command()
def build(
    model: Model,
    images: Images,
    out: Annotated[Path, typer.Option(help="Folder of the codebook; run again to resume.")],
    preset: Annotated[
        str | None, typer.Option(help="Thresholds of a published model; default: the model's own.")
    ] = None,
    tau_p: Annotated[float | None, typer.Option(help="Redundant tokens have P1 below this.")] = None,
    tau_j: Annotated[float | None, typer.Option(help="... and JSD_region + 16 JSD_global below this.")] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Tokens probed: ranks (by [CLS]), tiles, all; default: the preset's.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The question of every probe.")] = None,
    clusters_per_image: Annotated[int | None, typer.Option(help="Clusters of one image's probed tokens.")] = None,
    max_cluster_size: Annotated[int | None, typer.Option(help="Isolated: in one of those, at most this large.")] = None,
    clusters: Annotated[int | None, typer.Option(help="Clusters of all images' survivors.")] = None,
    min_image_fraction: Annotated[
        float | None, typer.Option(help="Recurrent: in one of those, from more than this fraction of the images.")
    ] = None,
    limit: Limit = None,
    batch: Batch = None,
    strict: Strict = False,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Run every probe on every token, for analysis: dear, same prototypes.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    engine: Engine = "local",
    address: Address = None,
    workers: Workers = 2,
    as_json: Json = False,
) -> None:
    """Probe training images and store the tokens that never change the answer as prototypes."""
    from codebook.cli import commands

    changes = {
        "tau_p": tau_p, "tau_j": tau_j, "candidates": candidates, "prompt": prompt,
        "clusters_per_image": clusters_per_image, "max_cluster_size": max_cluster_size, "clusters": clusters,
        "min_image_fraction": min_image_fraction,
    }  # fmt: skip
    how = commands.Probing(limit, strict, batch, device, dtype, exhaustive, engine, address, workers)
    commands.build_codebook(model, images, out, preset, changes, how, as_json)


@app.command()
def extend(
    folder: Annotated[Path, typer.Argument(help="A codebook's folder; it stays as it is.")],
    images: Images,
    out: Annotated[Path, typer.Option(help="Folder of the larger codebook; run again to resume.")],
    limit: Limit = None,
    batch: Batch = None,
    strict: Strict = False,
    device: Device = None,
    dtype: Dtype = None,
    engine: Engine = "local",
    address: Address = None,
    workers: Workers = 2,
    as_json: Json = False,
) -> None:
    """Add images to a codebook: the same result as building it from all of them."""
    from codebook.cli import commands

    how = commands.Probing(limit, strict, batch, device, dtype, False, engine, address, workers)
    commands.extend_codebook(folder, images, out, how, as_json)


@app.command()
def merge(
    first: Annotated[Path, typer.Argument(help="A codebook's folder.")],
    second: Annotated[Path, typer.Argument(help="Another's, of the same model and settings.")],
    out: Annotated[Path, typer.Option(help="Folder of the codebook of both.")],
    as_json: Json = False,
) -> None:
    """Merge two codebooks: the same result as building one from the images of both."""
    from codebook.cli import commands

    commands.merge_codebooks(first, second, out, as_json)


@app.command()
def prune(
    model: Annotated[
        str | None, typer.Argument(help="`miniature`, a folder, or a hub name; none with --tokens.")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Visual tokens kept, averaged over the layers, in (0, 1]; default: the schedule's, or 0.2."),
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Picture to ask about; repeat for several.")] = None,
    question: Annotated[str | None, typer.Option("--ask", help="The question.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            "--method",
            help="`seeded` (default), `codebook` (the paper's) or another method or preset (see `codebook list`), "
            "`codebook+random`, stages as in `codebook:0.25,random@9:0.05`, or a JSON file of them.",
        ),
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Position ids of kept tokens: keep or compact; default: the schedule's, or keep.")
    ] = None,
    codebook: Annotated[Path | None, typer.Option(help="Default: the one that ships for the model.")] = None,
    show: Annotated[Path | None, typer.Option(help="Write a picture of what was kept.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", help="JSONL of {image | images, question}; paths relative to it."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL of answers, or safetensors with --tokens.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="safetensors of projector outputs (n, d); needs no model.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions a batch, with --input.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    seed: Seed = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image of --input.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer questions with most visual tokens dropped; or prune token embeddings without a model."""
    from codebook.cli import commands
    from codebook.pruning.plan import DEFAULT, KEEP

    if tokens is not None:
        _only("--tokens", {"MODEL": model, "--image": image, "--ask": question, "--input": source, "--show": show,
                           "--schedule": schedule})  # fmt: skip
        if codebook is None or output is None:
            raise CodebookError("--tokens needs --codebook DIR and --output FILE")
        commands.prune_tokens(tokens, codebook, KEEP if keep is None else keep, output, as_json)
        return
    if model is None:
        raise CodebookError("name a model (`miniature`, a folder or a hub name), or give --tokens")
    plan = commands.Plan(schedule or DEFAULT, keep, positions, codebook, seed)
    if source is not None:
        _only("--input", {"--image": image, "--ask": question, "--show": show})
        if output is None:
            raise CodebookError("--input needs --output FILE")
        commands.prune_file(model, plan, source, output, batch, max_new_tokens, strict, device, as_json)
        return
    if not image or question is None:
        raise CodebookError("give --image FILE and --ask TEXT, or --input FILE, or --tokens FILE")
    _only("--image", {"--output": output})
    commands.prune_image(model, plan, image, question, show, max_new_tokens, device, as_json)


def _only(option: str, others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is not None and value != []:
            raise CodebookError(f"{name} does not go with {option}: leave one of them out")


@app.command()
def horizon(
    model: Model,
    data: Data,
    out: Annotated[
        Path | None, typer.Option(help="Folder for horizon.json, horizon.png and the journal; run again to resume.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="probability (default) or accuracy of the answer's first token, or generated answers.")
    ] = "probability",
    eps: Annotated[float, typer.Option(min=0.0, max=1.0, help="Largest loss that counts as none.")] = 0.01,
    margin: Annotated[
        int | None, typer.Option(min=0, help="Layers added for safety; default: one in sixteen, at least 1.")
    ] = None,
    count: Count = 50,
    split: Annotated[str, typer.Option(help="Of the miniature's scenes: train (default) or test.")] = "train",
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the layer beyond which visual tokens no longer change the answer, by task."""
    from codebook.cli import commands

    commands.find_horizon(model, data, out, metric, eps, margin, count, split, seed, device, as_json)


@app.command()
def calibrate(
    model: Model,
    data: Data,
    keep: Annotated[float, typer.Option(help="Visual tokens kept, averaged over the layers, in (0, 1].")],
    out: Annotated[Path, typer.Option(help="Schedule file, for `codebook prune --schedule`; run again to resume.")],
    method: Annotated[str, typer.Option(help="One method, as `codebook list` names it.")] = "codebook",
    first: Annotated[
        list[str] | None, typer.Option(help="Another method to try as the first stage; repeat for several.")
    ] = None,
    drop: Annotated[bool, typer.Option(help="Also try to drop all tokens.")] = True,
    codebook: Annotated[Path | None, typer.Option(help="Default: the one that ships for the model.")] = None,
    count: Count = 100,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Search for a schedule that spends the same budget better than the method alone; the latter, if there is none."""
    from codebook.cli import commands

    plan = commands.Plan(method, keep, None, codebook, seed)
    others = [commands.Plan(other, keep, None, codebook, seed).schedule for other in first or ()]
    commands.calibrate_schedule(model, plan, others, data, out, drop, count, device, as_json)


@app.command()
def bench(
    model: Model,
    methods: Annotated[
        str, typer.Option(help="With commas between: methods, presets, hybrids or schedule files (`codebook list`).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.html and journals; run again to resume.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="`miniature` (default) or miniature:FAMILY, JSONL as for horizon, with answers, or NAME:FOLDER for "
            "the public files of ai2d, gqa, mme, pope, refcoco, textvqa, vizwiz or vqav2; repeat for several."
        ),
    ] = None,
    keep: Annotated[str, typer.Option(help="Budgets: visual tokens kept, averaged over the layers.")] = "0.5,0.25,0.11",
    codebook: Annotated[Path | None, typer.Option(help="Default: the one that ships for the model.")] = None,
    horizon: Annotated[
        Path | None, typer.Option(help="A horizon.json for the report; default: the one in --out, if there is one.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Samples of each task; default: all, or 100 of the miniature's.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="One of the methods that every other one is compared with too, paired.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Samples whose kept tokens the report shows.")] = 12,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of methods that draw at random.")] = 3,
    seconds: Annotated[float, typer.Option(min=0, help="Of timing, after three rounds.")] = 120,
    batch: Annotated[int, typer.Option(min=1, help="Questions a batch.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    part: Annotated[
        str | None,
        typer.Option(
            help="i/n: answer only this part of the questions. Run all n, on as many devices, then without this."
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare methods at equal budgets: accuracy, latency, memory and what was kept, as one report."""
    from codebook.cli import commands_evaluation as commands
    from codebook.evaluation.bench import Settings

    settings = Settings(seed, batch, max_new_tokens, seconds, against)
    commands.run_bench(
        model,
        methods,
        keep,
        data or ["miniature"],
        out,
        codebook,
        horizon,
        count,
        show,
        seeds,
        settings,
        part,
        device,
        as_json,
    )


@app.command()
def show(
    model: Model,
    image: Annotated[Path, typer.Option(help="Picture to ask about.")],
    question: Annotated[str, typer.Option("--ask", help="The question.")],
    methods: Annotated[str, typer.Option(help="With commas between, as `codebook list` names them.")],
    keep: Annotated[float, typer.Option(help="Visual tokens kept, averaged over the layers, in (0, 1].")] = 0.25,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("show.png"),
    codebook: Annotated[Path | None, typer.Option(help="Default: the one that ships for the model.")] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw what each of several methods keeps of a picture, and what the model then answers."""
    from codebook.cli import commands_evaluation as commands

    commands.show_image(model, image, question, methods, keep, out, codebook, seed, device, as_json)


@app.command()
def explain(
    model: Model,
    image: Annotated[Path, typer.Option(help="Picture that the token is of.")],
    patch: Annotated[str, typer.Option(help="ROW,COL of the token, counted from 0.")],
    keep: Annotated[float, typer.Option(help="Say whether it is kept where this share of the tokens is.")] = 0.25,
    neighbours: Annotated[int, typer.Option(min=1, help="Prototypes to name.")] = 5,
    sheet: Annotated[Path | None, typer.Option(help="Write a picture of the tokens behind those prototypes.")] = None,
    images: Annotated[
        list[Path] | None, typer.Option(help="Where the codebook's images are, for --sheet; repeat for several.")
    ] = None,
    codebook: Annotated[Path | None, typer.Option(help="Default: the one that ships for the model.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Say why a token is dropped: the prototypes it is like, where they come from, what the probes measured."""
    from codebook.cli import commands_evaluation as commands

    commands.explain_patch(model, image, patch, keep, neighbours, sheet, images or [], codebook, device, as_json)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the codebooks that ship with the package, the methods, and the presets."""
    from codebook.cli import commands

    commands.list_all(as_json)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A codebook's folder.")],
    sheet: Annotated[Path | None, typer.Option(help="Write a picture of the tokens behind the prototypes.")] = None,
    images: Annotated[
        list[Path] | None, typer.Option(help="Where the images are, for --sheet; repeat for several.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a codebook holds and how it came about."""
    from codebook.cli import commands

    commands.inspect(folder, sheet, images or [], as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for images, codebook and picture.")] = Path("codebook-demo"),
    images: Annotated[int, typer.Option(min=1, help="Training images to build from.")] = 100,
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions a task family.")] = 40,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Build a codebook for the embedded model and compare pruning methods on held-out questions."""
    from codebook.cli.demo import run

    run(out, images, questions, seed, as_json)


@miniature_app.command("images")
def miniature_images(
    out: Annotated[Path, typer.Option(help="Folder to write PNG files to.")],
    count: Annotated[int, typer.Option(min=1)] = 100,
    seed: Seed = 0,
) -> None:
    """Write training scenes, for `codebook build miniature --images`."""
    from codebook import miniature

    miniature.write_images(out, count, seed=seed)
    print(out)


@miniature_app.command("train")
def miniature_train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and weights; run again to resume.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of the last stage; default: the recipe's. Run again to go on.")
    ] = None,
    seed: Seed = 0,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes, each with a batch of its own; default: 1 on a GPU, else up to 2 cores."),
    ] = None,
    device: Device = None,
) -> None:
    """Train the embedded model from scratch on procedural scenes; a run that was stopped goes on."""
    from codebook.miniature import train

    print(train.train(out, steps=steps, seed=seed, workers=workers, device=device))


@miniature_app.command("evaluate")
def miniature_evaluate(
    folder: Annotated[Path | None, typer.Argument(help="Weights of a training run; default: those that ship.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out questions a family.")] = 200,
    look: Annotated[
        list[str] | None, typer.Option(help="plain (default), photo, noise, scale: repeat for several.")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(help="Instead, prune it by baselines, an oracle and layer by layer; its rows' file."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Accuracy of the embedded model on held-out questions, beside its floor without the image."""
    from codebook.cli import commands

    commands.evaluate_miniature(folder, count, look or ["plain"], check, device or "cpu", as_json)
