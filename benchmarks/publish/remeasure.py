"""Rows of a results.json measured again, or added, without the others.

    python -m benchmarks.publish.remeasure benchmarks/publish/miniature.json --methods dart,sparsevlm --count 300 \\
        --out again

The rows are answered beside the unpruned model and the method that all rows are compared with, on the first `--count`
questions of each task, so that every difference is one of the same questions. They then stand in the places of the old
ones, new methods at the end, with their number of questions, and a note says which they are. Their times are those of
now, times what the unpruned model took then over what it takes now. Run it again to go on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from codebook import load, models
from codebook.cli.data import load_data
from codebook.cli.methods import parse_methods
from codebook.cli.output import progress
from codebook.errors import CodebookError
from codebook.evaluation import bench, looks
from codebook.evaluation.rows import Row, row_of
from codebook.pruning.presets import needs_codebook
from codebook.pruning.text import UNPRUNED
from codebook.store.shipped import find_codebook

TIMES = ("first_token", "decode", "vision", "selector", "prefill")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what `codebook bench` wrote; the new rows are written into it")
    parser.add_argument("--methods", required=True, help="methods whose rows are measured again, with commas between")
    parser.add_argument("--count", type=int, required=True, help="questions per task")
    parser.add_argument("--seconds", type=float, default=120, help="to spend on timing")
    parser.add_argument("--out", type=Path, required=True, help="folder of the journals; run again to go on")
    options = parser.parse_args()
    old = json.loads(options.results.read_text())
    model, processor = load(old["name"])
    if not models.identity(model).startswith(old["model"]):  # earlier ones did not end with the dtype
        raise CodebookError(f"{options.results} is of another model: measure all of it again")
    methods, rival, seed = parse_methods(options.methods), old["against"], old["seed"]
    rows, skipped = [Row(UNPRUNED, 1.0, (None,))], []
    for keep in old["keeps"]:
        for method in (rival, *methods):
            try:
                book = find_codebook(model, None) if needs_codebook(method) else None
                rows.append(row_of(model, method, keep, book, range(seed, seed + 1)))
            except CodebookError as error:
                skipped.append({"method": method, "keep": keep, "reason": str(error)})
    # Where no changed row meets a budget, nothing is compared there.
    used = {row.keep for row in rows if row.method in methods}
    rows = [row for row in rows if row.method == UNPRUNED or row.keep in used]
    tasks = load_data(old["data"], options.count, seed)
    settings = bench.BenchSettings(seed=seed, seconds=options.seconds, against=rival)
    options.out.mkdir(parents=True, exist_ok=True)
    with progress("answers", bench.count_answers(tasks, rows, settings), "answers") as tick:
        new = bench.measure(model, processor, tasks, rows, options.out, settings, tick)
    changed = [row for row in rows if row.method in methods]
    samples = looks.samples_to_show(tasks, len(old["samples"]))
    shown = looks.show_rows(model, processor, samples, changed, options.out / "samples.sqlite")
    merge(old, new, methods, options.count, skipped + new["skipped"], shown)
    options.results.write_text(json.dumps(old, indent=1) + "\n")


def merge(
    old: dict[str, Any],
    new: dict[str, Any],
    methods: list[str],
    count: int,
    skipped: list[dict[str, Any]],
    shown: list[dict[str, Any]],
) -> None:
    """Put the rows of `methods` into old results: at the places of those that they replace, new methods at the end."""
    first = [results["rows"][0]["cost"]["first_token"]["median"] for results in (old, new)]
    found = {_key(row): row for row in new["rows"] if row["method"] in methods}
    for row in found.values():
        row["samples"] = count
        for time in TIMES:
            of = row["cost"][time]
            of |= {part: of[part] and of[part] * first[0] / first[1] for part in ("q1", "median", "q3")}
    if missing := {_key(row) for row in old["rows"] if row["method"] in methods} - found.keys():
        raise CodebookError(f"rows that were not measured again: {sorted(missing)}")
    old["rows"] = _replaced(old["rows"], list(found.values()))
    old["skipped"] = _replaced(old["skipped"], [one for one in skipped if one["method"] in methods])
    for before, after in zip(old["samples"], shown, strict=True):
        if before["question"] != after["question"]:
            raise CodebookError("the samples that are shown are others: measure all rows again")
        before["rows"] = _replaced(before["rows"], [row for row in after["rows"] if row["method"] in methods])
    again = {row["method"]: row["samples"] for row in old["rows"] if "samples" in row}
    by_count = {n: [method for method, own in again.items() if own == n] for n in dict.fromkeys(again.values())}
    parts = [f"{', '.join(names)} on the first {n} questions of each task" for n, names in by_count.items()]
    old["note"] = (
        f"Measured later: {'; '.join(parts)}, where their differences from the unpruned model and the method compared "
        "with are of the same questions; their times are scaled to those of the unpruned model here."
    )


def _replaced(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The old rows, each new one in the place of the one of its method and budget, or at the end."""
    rows = {_key(row): row for row in old} | {_key(row): row for row in new}
    return list(rows.values())


def _key(row: dict[str, Any]) -> tuple[str, float]:
    return row["method"], row["keep"]


if __name__ == "__main__":
    main()
