"""What `bench`, `show` and `explain` of `codebook.cli` do once their options are parsed. Imports torch."""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from codebook import models
from codebook.analysis.explain import explain, words
from codebook.building import open_images
from codebook.building.sheet import sheet
from codebook.cli.data import load_data
from codebook.cli.output import note, progress
from codebook.errors import CodebookError
from codebook.evaluation import bench, report
from codebook.inference.overlay import comparison, maps
from codebook.inference.samples import Sample
from codebook.pruning.plan import Plan, find_codebook
from codebook.pruning.stage import check_keep
from codebook.pruning.text import split
from codebook.store.files import replacing
from codebook.store.pictures import read_image


def methods_of(text: str) -> list[str]:
    """Methods, presets, hybrids or schedule files, with commas between them; each is checked."""
    names = [name.strip() for _, name in split(text, ",") if name.strip()]
    if not names:
        raise CodebookError("name a method at least, as `codebook list` does")
    plans = [Plan(name) for name in names]
    return [plan.schedule for plan in plans if plan.schedule != bench.UNPRUNED]


def keeps_of(text: str) -> list[float]:
    """Budgets, with commas between them, the largest first."""
    try:
        keeps = [float(keep) for keep in text.split(",")]
    except ValueError:
        raise CodebookError(f"cannot read the budgets {text!r}: write fractions, as in 0.5,0.25,0.11") from None
    for keep in keeps:
        check_keep(keep)
    return sorted(set(keeps), reverse=True)


def part_of(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise CodebookError(f"cannot read the part {text!r}: write i/n with i from 1 to n, as in 1/4")
    return i, n


def maker(model: Any, codebook: Path | None, seed: int) -> Any:
    """Makes pruners by their names; reads the codebook once, and only if one needs it."""
    return Plan("codebook", None, None, codebook, seed).maker(functools.cache(lambda: find_codebook(model, codebook)))


def run_bench(
    name: str,
    methods: str,
    keeps: str,
    data: Sequence[str],
    out: Path,
    codebook: Path | None,
    horizon: Path | None,
    count: int | None,
    shown: int,
    seeds: int,
    settings: bench.Settings,
    part: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    chosen, budgets = methods_of(methods), keeps_of(keeps)
    against = None if settings.against is None else Plan(settings.against).schedule  # a file's text, as in `chosen`
    if against not in (None, *chosen, *bench.BASELINES):
        raise CodebookError(f"--against {settings.against} is none of the methods: add it to --methods")
    settings = replace(settings, against=against)
    share = None if part is None else part_of(part)
    curve = read_horizon(horizon or out / "horizon.json", horizon is not None)
    tasks = load_data(data, count, settings.seed)
    model, processor = models.load(name, device)
    make = maker(model, codebook, settings.seed)
    rows, skipped = bench.plan(model, chosen, budgets, make, range(settings.seed, settings.seed + seeds))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise CodebookError(f"{out} is a file: name a folder") from None
    if share is not None:
        i, n = share
        with progress(f"bench, part {i} of {n}", bench.work(tasks, rows, settings, share), "answers") as tick:
            bench.run(model, processor, tasks, rows, out, settings, tick, share)
        note(f"part {i} of {n} is answered: run the command without --part when all {n} are")
        return
    with progress("bench", bench.work(tasks, rows), "answers") as tick:
        results = bench.run(model, processor, tasks, rows, out, settings, tick)
    done = [row for row in rows if any((r["method"], r["keep"]) == (row.method, row.keep) for r in results["rows"])]
    samples = bench.shown(tasks, shown)
    with progress("samples", len(samples) * len(done), "answers") as tick:
        looks = bench.look(model, processor, samples, done, out / "samples.jsonl", settings.max_new_tokens, tick)
    results = {"name": name, "data": list(data), "keeps": budgets, **results, "samples": looks}
    results["skipped"] = skipped + results["skipped"]
    page = report.html(results, [sample.pictures() for sample in samples], curve)
    for file, text in (("results.json", json.dumps(results, indent=1) + "\n"), ("report.html", page)):
        with replacing(out / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if as_json:
        print(json.dumps(results))
        return
    print(report.markdown(results))
    for one in results["skipped"]:
        note(f"left out: {one['method']} at {one['keep']:g}: {one['reason']}")
    note(f"report: {out / 'report.html'}, {out / 'results.json'}")


def show_image(
    name: str,
    image: Path,
    question: str,
    methods: str,
    keep: float,
    out: Path,
    codebook: Path | None,
    seed: int,
    device: str | None,
    as_json: bool,
) -> None:
    chosen = methods_of(methods)
    check_keep(keep)
    picture = read_image(image)
    model, processor = models.load(name, device)
    plain = bench.Row(bench.UNPRUNED, 1.0, (None,))
    make, rows = maker(model, codebook, seed), [plain]
    for method in chosen:
        rows.append(bench.row(model, method, keep, make, [seed]))
    [found] = bench.look(model, processor, [Sample((picture,), question)], rows)
    grid = tuple(found["grids"][0])
    ways = [
        (f"{one['method']}: {len(one['kept'][0])} of {grid[0] * grid[1]}", one["text"] or "(nothing)", one["kept"][0])
        for one in found["rows"]
    ]
    with replacing(out) as temporary:
        comparison(picture, ways, grid).save(temporary, format="PNG")
    if as_json:
        print(
            json.dumps({"question": question, "grid": grid, "keep": keep, "rows": found["rows"], "picture": str(out)})
        )
        return
    marks = "■·" if "utf" in (sys.stdout.encoding or "").lower() else "#."
    print(maps(ways, grid, shutil.get_terminal_size((120, 24)).columns, marks))
    note(f"picture: {out}")


def explain_patch(
    name: str,
    image: Path,
    patch: str,
    keep: float,
    neighbours: int,
    picture: Path | None,
    images: list[Path],
    codebook: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    try:
        row, col = (int(number) for number in patch.split(","))
    except ValueError:
        raise CodebookError(f"cannot read the patch {patch!r}: write ROW,COL, counted from 0") from None
    check_keep(keep)
    if picture is not None and not images:
        raise CodebookError("--sheet needs --images: the images that the codebook came from")
    shown = read_image(image)
    model, processor = models.load(name, device)
    book = find_codebook(model, codebook)
    found = explain(model, processor, book, shown, (row, col), neighbours)
    kept = max(1, round(keep * found.tokens))
    if picture is not None:
        if not all("row" in one for one in found.neighbours):
            raise CodebookError("this codebook does not say which patches its prototypes are: leave --sheet out")
        title = f"prototypes nearest to patch {row},{col} of {image.name}"
        drawn = sheet(found.neighbours, found.grid, [open_images(folder) for folder in images], title)
        with replacing(picture) as temporary:
            drawn.save(temporary, format="PNG")
    if as_json:
        print(json.dumps(asdict(found) | {"tokens": found.tokens, "keep": kept, "kept": found.kept(kept)}))
    else:
        print(words(found, book.config, kept))


def read_horizon(path: Path, wanted: bool) -> dict[str, Any] | None:
    """What `codebook horizon --out` wrote, if it is there."""
    if not wanted and not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        found["horizons"], found["start"], found["eps"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CodebookError(f"{path} is no horizon.json: make one with `codebook horizon --out`") from None
    return dict(found)
