"""results.json as one HTML file that needs nothing but itself, and as Markdown."""

from __future__ import annotations

import base64
import inspect
import io
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from PIL import Image

from codebook.errors import counted
from codebook.evaluation.charts import MARKS, Point, Series, curve, dropped, mark, pareto, scatter, steps, tag
from codebook.evaluation.comparisons import RIGHT_FROM
from codebook.evaluation.remarks import Results, half_width, ranked, remarks
from codebook.evaluation.rows import BASELINES
from codebook.inference.uncertainty import UNKNOWN, plus_minus
from codebook.pruning.presets import expand
from codebook.pruning.text import DISTANCE, UNPRUNED

THUMBNAIL = 336
"""Longest side of a picture in the report, in pixels."""
HUES = 8


def html(
    results: Results, pictures: Sequence[Sequence[Image.Image]] = (), horizon: Mapping[str, Any] | None = None
) -> str:
    """The report.

    Parameters
    ----------
    results
        Contents of results.json.
    pictures
        For each of its `samples` the pictures.
    horizon
        Contents of a horizon.json, from `codebook.store.horizons.read_horizon`.
    """
    rows, keeps = results["rows"], results["keeps"]
    styles = _styles([row["method"] for row in rows])
    page = Environment(autoescape=True, trim_blocks=True).from_string(
        files("codebook.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    )
    looks = [_look(i, one, own, keeps) for i, (one, own) in enumerate(zip(results["samples"], pictures, strict=False))]
    machine = results["machine"]
    facts = [
        ("model", results["name"]), ("data", ", ".join(results["data"])),
        ("visual tokens", f"{results['tokens']} x {results['layers']} layers"), ("budgets", ", ".join(map(str, keeps))),
        ("machine", f"{machine['machine']}, {counted(machine['threads'], 'thread')}"),
        ("precision, torch", f"{_precision(results)}, {machine['torch']}"), ("seed", results["seed"]),
    ]  # fmt: skip
    series = [_series(rows, method, styles[method], "cost") for method in styles]
    return page.render(
        title=f"Visual-token pruning of {results['name']}", r=results, keeps=keeps, middle=len(keeps) // 2, facts=facts,
        samples=sum(task["samples"] for task in results["tasks"].values()),
        rounds=rows[0]["cost"]["first_token"]["rounds"],
        legend=[{"method": m, "mark": Markup(_legend_mark(style))} for m, style in styles.items()], counted=counted,
        frontier=Markup(scatter(series, "time to first token, share of the unpruned model's", "accuracy, %",
                                pareto([point for own in series for point in own.points]))),
        budgets=Markup(scatter([_series(rows, method, styles[method], "kept") for method in styles],
                               "visual tokens kept, averaged over the layers", "accuracy, %")),
        tables=_tables(results), horizon=_horizon(horizon), looks=looks, command=command_of(results),
        sentences={method: _sentence(method, results["layers"]) for method in styles},
        schedules=[
            {"name": _name(row), "method": row["method"], "schedule": row["schedule"],
             "kept": f"{100 * row['kept']['average']:.1f}%",
             "chart": Markup(steps(row["kept"]["layers"], rows[0]["kept"]["layers"][0]))}
            for row in rows
        ],
    )  # fmt: skip


def command_of(results: Results) -> str:
    """The command that measures the rows, as far as results.json says; limits of time and memory are not in it.

    Those of earlier versions do not say what `--count` was: it is known where all tasks have as many questions.
    """
    rows = results["rows"]
    options: dict[str, Any] = {
        "methods": ",".join(dict.fromkeys(row["method"] for row in rows[1:])),
        "keep": ",".join(f"{keep:g}" for keep in results["keeps"]),
    }
    counts = {task["samples"] for task in results["tasks"].values()}
    asked = {name: results.get(name) for name in ("count", "max_new_tokens", "codebook")}
    asked["count"] = results.get("count", counts.pop() if len(counts) == 1 else None)
    options |= {name.replace("_", "-"): value for name, value in asked.items() if value is not None}
    options |= {"seeds": max(row["seeds"] for row in rows), "seed": results["seed"]}
    options |= {"against": results["against"]} if results.get("against") else {}
    on_cpu = results.get("machine", {}).get("device", "cpu") == "cpu"
    options |= {"dtype": results["dtype"]} if results.get("dtype", "float32") != "float32" or not on_cpu else {}
    options |= {"attn": results["attention"]} if results.get("attention", "sdpa") != "sdpa" else {}
    options |= {"throughput": ",".join(map(str, results["batches"]))} if results.get("batches") else {}
    options |= {"out": "bench"}
    data = [] if results["data"] == ["miniature"] else [("data", one) for one in results["data"]]
    words = "".join(f" --{name} {_shell_word(str(value))}" for name, value in [*data, *options.items()])
    return f"codebook bench {_shell_word(results['name'])}{words}"


def _precision(results: Results) -> str:
    """Precision and, where it is known, attention kernel."""
    return ", ".join(str(results[key]) for key in ("dtype", "attention") if key in results)


def _shell_word(text: str) -> str:
    """A word as a shell reads it; methods' options have single quotes, and are written between double ones."""
    return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)


def _sentence(method: str, layers: int) -> str:
    """What a row does, from what its pruners' classes say of themselves."""
    if method == UNPRUNED:
        return "All visual tokens stay."
    found = []
    for stage in expand(method, layers)[0].stages:
        text = " ".join((inspect.getdoc(stage.entry.kind) or "").partition("\n\n")[0].split()).replace("`", "")
        options = ", ".join(f"{name}={value!r}" for name, value in {**stage.entry.given, **stage.options}.items())
        where = f"From layer {stage.layer} on: " if stage.layer else ""
        mass = " A kept token also stands for the dropped ones most like it." if stage.mass else ""
        if stage.mass == DISTANCE:
            mass += " The prompt attends to it the more, the further away it is."
        found.append(where + text + (f" ({options})" if options else "") + mass)
    return " ".join(found)


def _name(row: Mapping[str, Any]) -> str:
    return row["method"] if row["method"] == UNPRUNED else f"{row['method']} {row['keep']:g}"


def _styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a shape for each method; the baselines are grey."""
    styles: dict[str, tuple[str, str]] = {}
    grey = 0
    for method in dict.fromkeys(methods):
        if method in (UNPRUNED, *BASELINES):
            styles[method] = ("var(--ink)" if method == UNPRUNED else "var(--base)", MARKS[grey % len(MARKS)])
            grey += 1
    for i, method in enumerate(m for m in dict.fromkeys(methods) if m not in styles):
        styles[method] = f"var(--c{i % HUES})", MARKS[(i // HUES) % len(MARKS)]
    return dict(sorted(styles.items(), key=lambda item: list(methods).index(item[0])))


def _legend_mark(style: tuple[str, str]) -> str:
    line = tag("line", x1=0, x2=30, y1=6, y2=6, stroke=style[0])
    return tag("svg", line + mark(style[1], 15, 6, style[0]), viewBox="0 0 30 12")


def _series(rows: Sequence[Mapping[str, Any]], method: str, style: tuple[str, str], by: str) -> Series:
    points = []
    for row in sorted((r for r in rows if r["method"] == method), key=lambda r: r["keep"]):
        x = 1 / row["cost"]["speedup"]["median"] if by == "cost" else row["kept"]["average"]
        score, interval = row["mean"]["score"], row["mean"]["interval"]
        low, high = interval or (score, score)
        unsure = "" if interval else f", interval {UNKNOWN}"
        points.append(Point(x, score, low, high, f"{_name(row)}: {100 * score:.1f}%{unsure}, {x:.2f}"))
    return Series(method, points, *style, dashed=method in BASELINES)


def _cell(text: str, small: str = "", best: bool = False, shade: float | None = None) -> dict[str, Any]:
    kind = "plain" if shade is None else "tint"
    return {"text": text, "small": small, "best": best, "kind": kind, "shade": f"{100 * (shade or 0):.0f}"}


COSTS = (
    "kept", "first token, ms", "speed-up", "vision, ms", "selector, ms", "prefill, ms", "a token, ms", "peak, MiB",
    "KV, KiB", "GFLOPs",
)  # fmt: skip


def _costs_of(row: Mapping[str, Any]) -> list[str]:
    """Names of the columns of costs."""
    return [*COSTS, *(f"answers/s, batch {size}" for size in row["cost"].get("throughput", {}))]


def _tables(results: Results) -> list[dict[str, Any]]:
    rows, tasks, tables = results["rows"], list(results["tasks"]), []
    for keep in results["keeps"]:
        own, changes = ranked(rows, keep), _changes(results, keep)
        ranges = {task: _range([row["tasks"][task]["score"] for row in [rows[0], *own]]) for task in tasks}
        best = {task: max((row["tasks"][task]["score"] for row in own), default=0) for task in tasks}
        top = max((row["mean"]["score"] for row in own), default=None)
        quality = [_table_row(row, _quality(row, changes, ranges, best, top)) for row in [rows[0], *own]]
        columns = [(name, "") for name in ("mean", *changes)]
        columns += [(name, str(task["samples"])) for name, task in results["tasks"].items()]
        title = f"keep {keep:g}: accuracy, %; below each task the number of its questions"
        tables.append({"title": title, "columns": columns, "rows": quality, "note": " ".join(remarks(results, keep))})
        if detail := _detail(results):
            title = f"keep {keep:g}: what else the tasks measure, %"
            cells = [_table_row(row, [_cell(*one) for one in _detailed(row, detail)]) for row in [rows[0], *own]]
            columns = [(f"{task}: {METRIC_WORDS.get(name, name)}", "") for task, name in detail]
            tables.append({"title": title, "columns": columns, "rows": cells})
        cost = [_table_row(row, _spent(row)) for row in [rows[0], *own]]
        tables.append(
            {"title": f"keep {keep:g}: cost", "columns": [(name, "") for name in _costs_of(rows[0])], "rows": cost}
        )
    return tables


def _range(scores: Sequence[float]) -> tuple[float, float]:
    """Scores at which shading is empty and full: ten points apart at least, or noise would look like a difference."""
    return min(min(scores), max(scores) - 0.1), max(scores)


def _table_row(row: Mapping[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    return {"method": row["method"], "schedule": row["schedule"], "base": row["method"] in BASELINES, "cells": cells}


def _quality(
    row: Mapping[str, Any],
    changes: Mapping[str, str],
    ranges: Mapping[str, tuple[float, float]],
    best: Mapping[str, float],
    top: float | None,
) -> list[dict[str, Any]]:
    mean, is_pruned = row["mean"], row["method"] != UNPRUNED
    # Seeds that agree on too few questions for an interval do not show that they agree.
    apart = None if mean["interval"] is None else 100 * mean.get("spread", 0.0)
    spread = f" {row['seeds']} seeds {plus_minus(apart)}" if "spread" in mean else ""
    cells = [
        _cell(
            f"{100 * mean['score']:.1f}",
            f"{half_width(mean['interval'])}{spread}",
            best=is_pruned and mean["score"] == top,
        )
    ]
    cells += [_cell(*_change(row, key)) for key in changes.values()]
    for task, (low, high) in ranges.items():
        own = row["tasks"][task]
        is_top = is_pruned and own["score"] == best[task]
        shade = (own["score"] - low) / (high - low)
        cells.append(_cell(f"{100 * own['score']:.1f}", half_width(own["interval"]), best=is_top, shade=shade))
    return cells


def _changes(results: Results, keep: float) -> dict[str, str]:
    """The columns beside the mean: title, and the key that a row has them under."""
    rival = results.get("against")
    columns = {"against full": "mean", f"against {rival}": "against", "group A": "group_a"}
    rows = ranked(results["rows"], keep)
    return {title: key for title, key in columns.items() if any(key in row for row in rows)}


def _change(row: Mapping[str, Any], key: str) -> tuple[str, str]:
    """A row's difference, or score on a group, in percent, and half of its interval; empty where it has none."""
    if row["method"] == UNPRUNED or key not in row:
        return "", ""
    if key == "group_a":
        score = row[key]["score"]
        return ("-", "") if score is None else (f"{100 * score:.1f}", half_width(row[key]["interval"]))
    return f"{100 * row[key]['change']:+.1f}", half_width(row[key]["change_interval"])


METRIC_WORDS = {
    "chair_s": "CHAIR_S", "chair_i": "CHAIR_I", "yes_share": "yes",
    "per_figure": "by figure", "per_question": "by question",
}  # fmt: skip
"""Names of metrics in tables, where they are not their own."""


def _detail(results: Results) -> list[tuple[str, str]]:
    """The columns of what tasks measure beside their score: task, and name of the metric."""
    return [(task, name) for task, about in results["tasks"].items() for name in about.get("detail", ())]


def _detailed(row: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """A row's values of these in percent, and half of their intervals."""
    own = [(row["tasks"][task]["metrics"][name], row["tasks"][task]["intervals"][name]) for task, name in columns]
    return [(f"{100 * value:.1f}", half_width(interval)) for value, interval in own]


def _spent(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    cost = row["cost"]

    def ms(key: str, quartile: bool = True) -> dict[str, Any]:
        return _cell(f"{1e3 * cost[key]['median']:.1f}", _quartiles(cost[key], 1, 1e3) if quartile else "")

    speed = cost["speedup"]
    return [
        _cell(f"{100 * row['kept']['average']:.1f}%"), ms("first_token"),
        _cell(f"{speed['median']:.2f}", _quartiles(speed, 2)),
        ms("vision", False), ms("selector", False), ms("prefill", False), ms("decode"),
        _cell(f"{cost['peak_memory'] / 2**20:.1f}"), _cell(f"{cost['kv_cache'] / 2**10:.0f}"),
        _cell(f"{cost['flops'] / 1e9:.2f}"),
        *(_cell(UNKNOWN) if one is None else _cell(f"{one['median']:.2f}", _quartiles(one, 2))
          for one in cost.get("throughput", {}).values()),
    ]  # fmt: skip


def _quartiles(found: Mapping[str, Any], digits: int, unit: float = 1.0) -> str:
    if found["q1"] is None:  # one round
        return plus_minus(None)
    return f"{unit * found['q1']:.{digits}f} - {unit * found['q3']:.{digits}f}"


def _horizon(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    panels = []
    for task, one in found["horizons"].items():
        text = f"{task}: horizon {UNKNOWN}"
        if one["interval"] is not None:
            low, high = one["interval"]
            text = f"{task}: horizon {one['layer']} [{low}, {high}], safe from {one['safe']}"
        elif one.get("unknown"):
            text += f", {one['unknown']}"
        chart = curve(one["loss"], one["error"], found["start"], one["layer"], one["safe"])
        panels.append({"chart": Markup(chart), "text": text})
    return {"eps": found["eps"], "panels": panels}


def _look(i: int, one: Mapping[str, Any], pictures: Sequence[Image.Image], keeps: Sequence[float]) -> dict[str, Any]:
    grids = [tuple(grid) for grid in one["grids"]]
    images = [
        {"id": f"p{i}-{j}", "rows": rows, "cols": cols, "crisp": _tiny(picture), "data": data_uri(picture)}
        for j, (picture, (rows, cols)) in enumerate(zip(pictures, grids, strict=True))
    ]

    def tile(row: Mapping[str, Any]) -> dict[str, Any]:
        shots = zip(images, [dropped(kept, grid) for kept, grid in zip(row["kept"], grids, strict=True)], strict=True)
        verdict = "" if row["score"] is None else "right" if row["score"] >= RIGHT_FROM else "wrong"
        return {**row, "shots": list(shots), "verdict": verdict, "count": sum(map(len, row["kept"]))}

    full = [tile(row) for row in one["rows"] if row["method"] == UNPRUNED]
    budgets = [
        [tile(row) for row in one["rows"] if row["keep"] == keep and row["method"] != UNPRUNED] for keep in keeps
    ]
    return {key: one[key] for key in ("task", "question", "answer")} | {
        "images": images, "full": full, "budgets": budgets,
    }  # fmt: skip


def _tiny(picture: Image.Image) -> bool:
    """Whether a picture is small, and so more likely drawn than photographed: it is shown pixel by pixel."""
    return max(picture.size) <= THUMBNAIL // 2


def data_uri(picture: Image.Image) -> str:
    """A picture, scaled down, as a data URI."""
    small, out = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    kind = "PNG" if _tiny(picture) else "JPEG"
    small.save(out, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def markdown(results: Results) -> str:
    """The tables, one pair per budget: accuracy in percent with 95% intervals, the best row first; then the costs."""
    rows, tasks, lines = results["rows"], list(results["tasks"]), []
    for keep in results["keeps"]:
        own, changes = [rows[0], *ranked(rows, keep)], _changes(results, keep)
        lines += [f"## keep {keep:g}", "", *_header([*tasks, "mean", *changes])]
        for row in own:
            mean = row["mean"]
            cells = [f"{100 * row['tasks'][task]['score']:.1f}" for task in tasks]
            cells += [f"{100 * mean['score']:.1f} {half_width(mean['interval'])}"]
            lines.append(
                _markdown_row(row["method"], cells + [" ".join(_change(row, key)).strip() for key in changes.values()])
            )
        for text in remarks(results, keep):
            lines += ["", text]
        if detail := _detail(results):
            lines += ["", *_header([f"{task}: {METRIC_WORDS.get(name, name)}" for task, name in detail])]
            lines += [_markdown_row(row["method"], [" ".join(one) for one in _detailed(row, detail)]) for row in own]
        lines += ["", *_header(_costs_of(rows[0]))]
        lines += [
            _markdown_row(row["method"], [" ".join((c["text"], c["small"])).strip() for c in _spent(row)])
            for row in own
        ]
        lines.append("")
    machine = results["machine"]
    counts = ", ".join(f"{name} {task['samples']}" for name, task in results["tasks"].items())
    lines.append(
        f"Timed on {machine['machine']}, {counted(machine['threads'], 'thread')}, torch {machine['torch']}, "
        f"{_precision(results)}; {rows[0]['cost']['first_token']['rounds']} rounds. Questions: {counts}. Seed "
        f"{results['seed']}."
    )
    return "\n".join(lines) + "\n"


def _header(columns: Sequence[str]) -> list[str]:
    return [_markdown_row("", columns), "|---" * (len(columns) + 1) + "|"]


def _markdown_row(name: str, cells: Sequence[str]) -> str:
    row = " | ".join(cell.replace("|", "\\|") for cell in (name, *cells))
    return f"| {row} |"
