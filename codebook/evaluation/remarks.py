"""What stands below a table of a benchmark: who is ahead, who is below a gate, and what group A is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from codebook.errors import counted
from codebook.evaluation.comparisons import DOWNSAMPLED, GATES
from codebook.evaluation.rows import NEAR
from codebook.inference.uncertainty import plus_minus
from codebook.pruning.text import UNPRUNED

Results = Mapping[str, Any]
"""Contents of results.json."""


def ranked(rows: Sequence[Mapping[str, Any]], keep: float) -> list[Mapping[str, Any]]:
    """The rows at a budget, the best first."""
    own = [row for row in rows if row["keep"] == keep and row["method"] != UNPRUNED]
    return sorted(own, key=lambda row: -row["mean"]["score"])


def half_width(interval: Sequence[float] | None) -> str:
    """Half the interval's width, in percent, as text."""
    return plus_minus(None if interval is None else 50 * (interval[1] - interval[0]))


def remarks(results: Results, keep: float) -> list[str]:
    """Sentences below the table of a budget."""
    rows = ranked(results["rows"], keep)
    every = (_off_budget(keep, rows), _ahead(results, keep, rows), _about_group(results, keep, rows), _warning(rows))
    return [text for text in every if text]


def _off_budget(keep: float, rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence that names the rows that kept more or fewer tokens than the budget of the pictures that were shown."""
    off = [row for row in rows if abs(row["kept"]["average"] - keep) > NEAR]
    named = ", ".join(f"{row['method']} ({100 * row['kept']['average']:.1f}%)" for row in off)
    return f"Not at this budget, on average over questions and layers: {named}." if off else ""


def _ahead(results: Results, keep: float, rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence that names the rows above the one they are compared with, beyond the interval, and the tasks."""
    rival, found = results.get("against"), []
    if rival and all(row["method"] != rival for row in rows):
        return f"No row is compared with {rival} at this budget{_why_missing(results, rival, keep)}."
    for row in rows:
        tasks = row["against"]["tasks"] if "against" in row else {}
        better = [
            f"{task} {100 * one['change']:+.1f}"
            for task, one in tasks.items()
            if one["change_interval"] and one["change_interval"][0] > 0
        ]
        found += [f"{row['method']} ({', '.join(better)})"] if better else []
    text = f"Tasks in which others are above {rival} beyond the interval: {', '.join(found) or 'none'}."
    return text if rival else ""


def _about_group(results: Results, keep: float, rows: Sequence[Mapping[str, Any]]) -> str:
    """What group A is at this budget, or why it is not known."""
    if found := next((row["group_a"] for row in rows if "group_a" in row and "samples" not in row), None):
        total = sum(task["samples"] for task in results["tasks"].values())
        return (
            f"Group A: {found['samples']} of {counted(total, 'question')}, which the unpruned model answers right and "
            f"{DOWNSAMPLED} at this budget does not."
        )
    if any(row["method"] == DOWNSAMPLED for row in rows):
        return ""  # measured by an earlier version
    why = _why_missing(results, DOWNSAMPLED, keep)
    return f"Group A is not known at this budget: it needs the row {DOWNSAMPLED}{why}."


def _why_missing(results: Results, method: str, keep: float) -> str:
    """Why a row was left out, as the end of a sentence; empty where nothing says so."""
    skipped = results.get("skipped", ())
    reasons = [one["reason"] for one in skipped if (one["method"], one["keep"]) == (method, keep)]
    return f", which was left out: {reasons[0]}" if reasons else ""


def _warning(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence that names the rows that are below a gate beyond the paired interval."""
    found = []
    for gate in GATES:
        apart = {row["method"]: row["gates"][gate] for row in rows if gate in row.get("gates", {})}
        below = [
            f"{method} ({100 * one['change']:+.1f} {half_width(one['change_interval'])})"
            for method, one in apart.items()
            if one["change_interval"] and one["change_interval"][1] < 0
        ]
        found += [f"below {gate}: {', '.join(below)}"] if below else []
    return f"Warning, beyond the paired interval {'; '.join(found)}." if found else ""
