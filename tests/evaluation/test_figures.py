"""The table of a card, from a results.json."""

import json

import pytest

from codebook.errors import CodebookError
from codebook.evaluation.figures import read_figures

FINGERPRINT = "llava:1-3f80:1-3f80"


def row(method, keep, score, half=0.01):
    return {"method": method, "keep": keep, "mean": {"score": score, "interval": half and [score - half, score + half]}}


RESULTS = {
    "name": "org/model",
    "model": f"{FINGERPRINT}:0123456789abcdef",
    "tasks": {"a": {}, "b": {}},
    "rows": [
        row("unpruned", 1.0, 0.9), row("seeded", 0.5, 0.85), row("fastv", 0.5, 0.8),
        row("codebook+random", 0.25, 0.5, None), row("random", 0.25, 0.4), row("of-another-version", 0.25, 0.4),
    ],
}  # fmt: skip


def test_the_table(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert read_figures(tmp_path / "results.json", FINGERPRINT) == (
        "Accuracy in percent, mean over 2 tasks with 95% intervals, by visual tokens kept; unpruned: 90.0 ± 1.0. "
        "Measured by `codebook bench` on org/model.\n\n"
        "| method | keep 0.5 | keep 0.25 |\n|---|---|---|\n"
        "| seeded | 85.0 ± 1.0 | - |\n| codebook+random | - | 50.0 ± unknown |\n| random | - | 40.0 ± 1.0 |"
    )
    assert read_figures(tmp_path / "results.json", None)
    with pytest.raises(CodebookError, match="measured on another model"):
        read_figures(tmp_path / "results.json", "llava:1-3f80:2-3f80")


@pytest.mark.parametrize("change", [
    {"rows": []}, {"rows": 5}, {"model": None}, {"tasks": None},
    {"rows": [row("seeded", 0.5, 0.5) | {"mean": {"score": "high"}}]},
    {"rows": [row("seeded", float("nan"), 0.5)]},
])  # fmt: skip
def test_what_is_no_results_json(tmp_path, change):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | change))
    with pytest.raises(CodebookError, match="codebook bench"):
        read_figures(tmp_path / "results.json", None)
    with pytest.raises(CodebookError, match=r"no none\.json"):
        read_figures(tmp_path / "none.json", None)
