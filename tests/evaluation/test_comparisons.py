"""Group A and the gates on a small table made by hand."""

import json

import numpy as np
import pytest

from codebook.evaluation.comparisons import add_comparisons, gather_runs, group_a
from codebook.evaluation.metrics import ACCURACY, Task
from codebook.evaluation.remarks import remarks
from codebook.inference.respond import Response
from codebook.inference.samples import Sample

# What each row says to the eight questions of one task and the two of another: 1 is right.
TABLE = {
    ("unpruned", 1.0): "11111110 11",
    ("downsample", 0.1): "11100001 10",
    ("random", 0.1): "11111100 11",
    ("good", 0.1): "11111010 11",
    ("bad", 0.1): "00000000 01",
}
# Right of the unpruned model and wrong of the smaller picture: questions 3 to 6, and the last.
GROUP = [0, 0, 0, 1, 1, 1, 1, 0, 0, 1]


def tasks():
    return [
        Task(name, [Sample((), str(i), "1", name) for i in range(count)], ACCURACY)
        for name, count in (("a", 8), ("b", 2))
    ]


def runs(said):
    return [[Response(text, []) for text in run.replace(" ", "")] for run in said.split("/")]


def compared(table, against=None):
    results = [{"method": method, "keep": keep, "kept": {"average": keep}} for method, keep in table]
    rows = [gather_runs(tasks(), method, keep, runs(said)) for (method, keep), said in table.items()]
    add_comparisons(results, tasks(), rows, against)
    whole = {"rows": results, "tasks": {task.name: {"samples": len(task.samples)} for task in tasks()}, "skipped": []}
    return whole, {row["method"]: row for row in results}, rows


def test_group_a_by_hand():
    _, found, rows = compared(TABLE)
    assert group_a(rows[0], rows[1]).astype(int).tolist() == GROUP
    assert "group_a" not in found["unpruned"]
    for method, (score, a, b) in {"downsample": (0, 0, 0), "good": (4 / 5, 3 / 4, 1), "bad": (1 / 5, 0, 1)}.items():
        own = found[method]["group_a"]
        assert (own["score"], own["samples"]) == (pytest.approx(score), 5)
        assert own["tasks"]["a"]["score"] == pytest.approx(a) and own["tasks"]["b"]["score"] == pytest.approx(b)
        assert own["tasks"]["b"]["interval"] is None  # of a single question
    low, high = found["good"]["group_a"]["interval"]
    assert 0.3 < low < 0.8 < high < 1


def test_seeds_count_by_halves():
    """Half of the seeds right is half a point, and downsampling is always the same."""
    _, found, _ = compared({**TABLE, ("random", 0.1): "11111100 11/00000000 00"})
    assert found["random"]["group_a"]["score"] == pytest.approx((3 + 1) / 2 / 5)


def test_gates_are_paired_differences():
    _, found, _ = compared(TABLE)
    assert set(found["good"]["gates"]) == {"random", "downsample"} and set(found["random"]["gates"]) == {"downsample"}
    assert "gates" not in found["unpruned"]
    apart = found["bad"]["gates"]["random"]  # six of eight and one of two fewer
    assert apart["change"] == pytest.approx((-6 / 8 - 1 / 2) / 2)
    errors = [np.std([1] * 6 + [0] * 2, ddof=1) / 8**0.5, np.std([1, 0], ddof=1) / 2**0.5]
    half = 1.96 * np.hypot(*errors) / 2
    assert apart["change_interval"] == pytest.approx([apart["change"] - half, apart["change"] + half], rel=1e-4)


def test_a_warning_names_what_is_below_a_gate_beyond_the_interval():
    results, _, _ = compared(TABLE)
    group, warning = remarks(json.loads(json.dumps(results)), 0.1)
    assert group == (
        "Group A: 5 of 10 questions, which the unpruned model answers right and downsample at this budget does not."
    )
    assert warning.startswith("Warning, beyond the paired interval below random: bad (-62.5 ± ")
    first = max(results["rows"], key=lambda row: row["keep"] == 0.1 and row["mean"]["score"])
    later = first | {"samples": 4, "group_a": first["group_a"] | {"samples": 2}}  # measured again on fewer questions
    again = results | {"rows": [later if row is first else row for row in results["rows"]]}
    assert remarks(again, 0.1)[0] == group
    assert "good" not in warning and "below downsample" not in warning  # -47.5 ± 52.7 there: two tasks, one of two
    fine, _, _ = compared({own: said for own, said in TABLE.items() if own[0] != "bad"})
    assert len(remarks(fine, 0.1)) == 1


def test_without_the_row_of_downsampling_group_a_is_not_known():
    results, found, _ = compared({own: said for own, said in TABLE.items() if own[0] != "downsample"})
    assert not any("group_a" in row for row in found.values())
    assert "Group A is not known at this budget: it needs the row downsample." in remarks(results, 0.1)
    assert remarks(results | {"against": "nuwa"}, 0.1)[0] == "No row is compared with nuwa at this budget."
    results["skipped"] = [{"method": "downsample", "keep": 0.1, "reason": "images have one size"}]
    assert "row downsample, which was left out: images have one size." in remarks(results, 0.1)[0]


def test_no_question_in_group_a():
    results, found, _ = compared({**TABLE, ("downsample", 0.1): "11111111 11"})
    assert found["good"]["group_a"] == {"score": None, "interval": None, "samples": 0, "tasks": {}}
    assert remarks(results, 0.1)[0].startswith("Group A: 0 of 10")


def test_tasks_about_the_same_pictures_are_no_independent_draws(tmp_path):
    """As POPE's three are: the same question asked in two tasks says no more about a row than in one."""
    rng = np.random.default_rng(0)
    said = {row: "".join(map(str, (rng.random(40) < share).astype(int))) for row, share in SHARES.items()}

    def compare(*names):
        own = [Task(n, [Sample((tmp_path / str(i // 2),), "q", "1", n) for i in range(40)], ACCURACY) for n in names]
        results = [{"method": method, "keep": keep} for method, keep in said]
        rows = [gather_runs(own, *row, runs(text * len(names))) for row, text in said.items()]
        add_comparisons(results, own, rows, "good")
        return {row["method"]: row for row in results}

    once, twice = compare("a"), compare("a", "b")
    for method in said:
        one, two = once[method[0]], twice[method[0]]
        assert two["mean"]["interval"] == pytest.approx(one["mean"]["interval"])
        assert two["mean"]["change_interval"] == pytest.approx(one["mean"]["change_interval"])
        for key in ("against", "gates", "group_a"):
            assert (key in two) == (key in one)
        if "against" in one:
            assert two["against"]["change_interval"] == pytest.approx(one["against"]["change_interval"])
        for gate, apart in one.get("gates", {}).items():
            assert two["gates"][gate]["change_interval"] == pytest.approx(apart["change_interval"])
        if "group_a" in one:
            assert two["group_a"]["interval"] == pytest.approx(one["group_a"]["interval"], abs=1e-6)
            assert two["group_a"]["samples"] == 2 * one["group_a"]["samples"]


SHARES = {("unpruned", 1.0): 0.9, ("downsample", 0.1): 0.4, ("random", 0.1): 0.6, ("good", 0.1): 0.7}
