"""`codebook bench`: methods compared at equal budgets, as one report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from codebook.cli.options import (
    CodebookOption,
    JsonOption,
    Loading,
    MethodsOption,
    ModelOption,
    NewTokensOption,
    PullOption,
    SecondsOption,
    SeedOption,
    with_groups,
)
from codebook.cli.output import note, progress, resumable
from codebook.errors import CodebookError


@resumable()
@with_groups
def bench_command(
    model: ModelOption,
    loading: Loading,
    methods: MethodsOption,
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.html and journals; run again to resume.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="`miniature` (default), miniature:FAMILY or miniature:turns, JSONL as for horizon, with answers, "
            "NAME:FOLDER for the public files of ai2d, chair, chartqa, docvqa, easyvqa, gqa, infovqa, mme, mvbench, "
            "ocrbench, pope, refcoco, textvqa, videomme, vizwiz or vqav2, parquet:FILE or hub:OWNER/NAME; repeat for "
            "several."
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Budgets, separated by commas: visual tokens kept, averaged over the layers.")
    ] = "0.5,0.25,0.11",
    codebook: CodebookOption = None,
    pull: PullOption = False,
    horizon: Annotated[
        Path | None, typer.Option(help="A horizon.json for the report; default: the one in --out, if there is one.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Samples per task; default: all, or 100 of the miniature's.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="A method that every other one is also compared with, sample by sample.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Samples whose kept tokens the report shows.")] = 12,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method that draws at random.")] = 3,
    seconds: SecondsOption = 120,
    throughput: Annotated[
        str | None,
        typer.Option(help="Also measure answers per second in batches of these sizes, as in 1,8,32."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 32,
    max_new_tokens: NewTokensOption = 32,
    part: Annotated[
        str | None,
        typer.Option(
            help="i/n: answer only this part of the questions. Run all n, on as many devices, then without this."
        ),
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare methods at equal budgets, as one report.

    It has accuracy with intervals, latency, memory and what was kept, beside random, an even grid and a smaller image.
    """
    from codebook import models
    from codebook.cli.checks import check_codebook, check_output_folder
    from codebook.cli.data import load_data
    from codebook.cli.methods import parse_methods
    from codebook.evaluation import bench, report
    from codebook.evaluation.looks import samples_to_show, show_rows
    from codebook.evaluation.rows import BASELINES, plan
    from codebook.inference.overlay import shown_part
    from codebook.pruning.plan import Plan
    from codebook.pruning.text import UNPRUNED
    from codebook.store.files import write_text
    from codebook.store.folder import HORIZON_FILE
    from codebook.store.horizons import check_horizon

    chosen, budgets = parse_methods(methods), _parse_budgets(keep)
    # A schedule file stands for its text in `chosen`; so it does here.
    opponent = None if against is None else Plan(against).schedule
    if opponent == UNPRUNED:
        raise CodebookError("every row is compared with the unpruned model as it is: leave --against out")
    if opponent not in (None, *chosen, *BASELINES):
        raise CodebookError(f"--against {against} is none of the methods: add it to --methods")
    sizes = () if throughput is None else _parse_sizes(throughput)
    settings = bench.BenchSettings(seed, batch, max_new_tokens, seconds, opponent, sizes)
    share = None if part is None else _parse_part(part)
    check_output_folder(out, ("results.json", "report.html"))
    check_codebook(codebook, model, pull)
    loading.check(model)
    curve = _read_horizon(horizon or out / HORIZON_FILE, horizon is not None)
    named = data or ["miniature"]
    tasks = load_data(named, count, seed, loading.frame_rule(model))
    loaded, processor = loading.load(model)
    if curve is not None:
        check_horizon(horizon or out / HORIZON_FILE, curve, loaded)
    rows, skipped = plan(loaded, chosen, budgets, codebook, range(seed, seed + seeds))
    if chosen and not any(row.method in chosen for row in rows):
        raise CodebookError(f"no method is left to measure: {skipped[0]['reason']}")
    if share is not None:
        i, n = share
        with progress(f"bench, part {i} of {n}", bench.count_answers(tasks, rows, settings, share), "answers") as tick:
            bench.measure(loaded, processor, tasks, rows, out, settings, tick, share)
        note(f"part {i} of {n} is answered: run the command without --part when all {n} are")
        return
    with progress("bench", bench.count_answers(tasks, rows), "answers") as tick:
        results = bench.measure(loaded, processor, tasks, rows, out, settings, tick)
    done = [row for row in rows if any((r["method"], r["keep"]) == (row.method, row.keep) for r in results["rows"])]
    samples = samples_to_show(tasks, show)
    with progress("samples", len(samples) * len(done), "answers") as tick:
        looks = show_rows(loaded, processor, samples, done, out / "samples.sqlite", max_new_tokens, tick)
    asked = {"name": model, "data": list(named), "keeps": budgets, "count": count, "max_new_tokens": max_new_tokens}
    asked["codebook"] = None if codebook is None else str(codebook)
    results = {**asked, **results, "samples": looks}
    results["skipped"] = skipped + results["skipped"]
    family = models.family(models.unwrap(loaded))
    shown = [[shown_part(one, family.shown_box(processor, one.size)) for one in s.pictures()] for s in samples]
    page = report.html(results, shown, curve)
    for file, text in (("results.json", json.dumps(results, indent=1) + "\n"), ("report.html", page)):
        write_text(out / file, text)
    if as_json:
        print(json.dumps(results))
        return
    print(report.markdown(results))
    note(f"report: {out / 'report.html'}, {out / 'results.json'}")


def _parse_budgets(text: str) -> list[float]:
    """Budgets, separated by commas, the largest first."""
    from codebook.pruning.stage import check_keep

    try:
        keeps = [float(keep) for keep in text.split(",")]
    except ValueError:
        raise CodebookError(f"cannot read the budgets {text!r}: write fractions, as in 0.5,0.25,0.11") from None
    for keep in keeps:
        check_keep(keep)
    return sorted(set(keeps), reverse=True)


def _parse_sizes(text: str) -> tuple[int, ...]:
    """Sizes of batches, separated by commas, the smallest first."""
    if not all(re.fullmatch(r"[1-9]\d{0,3}", size.strip()) for size in text.split(",")):
        raise CodebookError(f"cannot read the batches {text!r}: write numbers from 1 to 9999, as in 1,8,32")
    return tuple(sorted({int(size) for size in text.split(",")}))


def _parse_part(text: str) -> tuple[int, int]:
    """(i, n) from `i/n`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise CodebookError(f"cannot read the part {text!r}: write i/n with i from 1 to n, as in 1/4")
    return i, n


def _read_horizon(path: Path, wanted: bool) -> dict[str, Any] | None:
    """What `codebook horizon --out` wrote; None if the file is missing and the user did not name it."""
    if not wanted and not path.is_file():
        return None
    from codebook.store.horizons import read_horizon

    return read_horizon(path)
