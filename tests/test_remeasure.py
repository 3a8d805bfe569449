"""Rows that are measured again take the places of the old ones, new ones come last, and nothing else changes."""

import copy

import pytest

from benchmarks.publish.remeasure import TIMES, merge
from codebook.errors import CodebookError


def results(score, seconds, methods):
    def row(method, keep):
        times = {time: {"q1": None, "median": seconds, "q3": 2 * seconds, "rounds": 3} for time in TIMES}
        return {"method": method, "keep": keep, "mean": score, "cost": {**times, "kv_cache": 7}}

    return {
        "rows": [row("unpruned", 1.0), *(row(method, keep) for keep in (0.5, 0.25) for method in methods)],
        "skipped": [{"method": "dart", "keep": 0.05, "reason": "old"}],
        "samples": [{"question": "what?", "rows": [{"method": m, "keep": 0.5, "text": str(score)} for m in methods]}],
    }


def test_rows_measured_again():
    old, new = results(0.8, 4.0, ["dart", "fastv"]), results(0.9, 2.0, ["dart", "seeded"])
    before = copy.deepcopy(old)
    skipped = [{"method": "dart", "keep": 0.05, "reason": "new"}]
    shown = [{"question": "what?", "rows": [{"method": "dart", "keep": 0.5, "text": "0.9"}]}]
    merge(old, new, ["dart"], 96, skipped, shown)
    assert [(row["method"], row["mean"], row.get("samples")) for row in old["rows"]] == [
        ("unpruned", 0.8, None), ("dart", 0.9, 96), ("fastv", 0.8, None), ("dart", 0.9, 96), ("fastv", 0.8, None),
    ]  # fmt: skip
    # The unpruned model took 4 s then and takes 2 s now: what takes 2 s now would have taken 4.
    assert old["rows"][1]["cost"]["first_token"] == {"q1": None, "median": 4.0, "q3": 8.0, "rounds": 3}
    assert [row for row in old["rows"] if row["method"] != "dart"] == [
        r for r in before["rows"] if r["method"] != "dart"
    ]
    assert old["skipped"] == skipped and "dart on the first 96 questions" in old["note"]
    assert [row["text"] for row in old["samples"][0]["rows"]] == ["0.9", "0.8"]


def test_new_methods_come_last():
    old, new = results(0.8, 4.0, ["dart"]), results(0.9, 2.0, ["fastv", "seeded"])
    merge(old, new, ["fastv"], 96, [], new["samples"])
    assert [(row["method"], row["keep"]) for row in old["rows"]] == [
        ("unpruned", 1.0), ("dart", 0.5), ("dart", 0.25), ("fastv", 0.5), ("fastv", 0.25),
    ]  # fmt: skip
    assert [row["method"] for row in old["samples"][0]["rows"]] == ["dart", "fastv"]


def test_rows_that_were_not_measured_again_are_refused():
    old, new = results(0.8, 4.0, ["dart", "fastv"]), results(0.9, 2.0, ["dart"])
    with pytest.raises(CodebookError, match=r"not measured again: .*fastv"):
        merge(old, new, ["dart", "fastv"], 96, [], [])
