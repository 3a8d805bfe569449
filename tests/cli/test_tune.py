"""`codebook tune`: from a model and images to a folder that `prune` takes as it is."""

import json
import sys

import pytest

from codebook import miniature
from codebook.analysis.prefill import UnsharedError
from codebook.store.locks import writing

COUNT = ["--count", "2", "--seconds", "0", "--pilot", "2", "--select", "0.3"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    miniature.write_images(folder, 8)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """48 questions, two about each of 24 pictures, one after the other, and a few of them without an answer."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    shown = miniature.write_images(path.parent, 24)
    asked = ["is there a red circle?", "how many objects are there?", "read the number."] * 16
    lines = [
        {"image": str(shown[i // 2]), "question": text, **({"answer": "yes"} if i % 3 == 0 else {})}
        for i, text in enumerate(asked)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_recipe_is_made_resumed_and_used(run, refused, scenes, questions, tmp_path):
    out = tmp_path / "recipe"
    command = ["tune", "miniature", "--images", scenes, "--data", questions, "--out", out, *COUNT, "--count", "20"]
    command += ["--first", "uniform"]
    code, said, told = run(*command)
    assert code == 0, told
    tried = json.loads((out / "schedule.json").read_text())["calibration"]["rounds"][0]
    assert any(schedule.startswith("uniform") for schedule in tried)
    assert "Where no answer was given, the unpruned model's own is the label." in said
    assert {"codebook", "schedule.json", "horizon", "bench", "README.md"} <= {path.name for path in out.iterdir()}
    halves = [(out / f"questions-{name}.jsonl").read_text().splitlines() for name in ("tune", "bench")]
    assert [len(half) for half in halves] == [20, 20]
    shown = [{json.loads(line)["images"][0] for line in half} for half in halves]
    assert [len(own) for own in shown] == [10, 10] and not shown[0] & shown[1]
    results = json.loads((out / "bench" / "results.json").read_text())
    assert {"random", "uniform", "downsample"} < {row["method"] for row in results["rows"]}

    # a step that is missing is made again, the others are not
    stamps = {name: (out / name).stat().st_mtime_ns for name in ("codebook/config.json", "bench/results.json")}
    (out / "horizon" / "horizon.json").unlink()
    assert run(*command)[0] == 0
    # the codebook's folder has it, so that it is found and pushed
    assert (out / "codebook" / "horizon.json").read_bytes() == (out / "horizon" / "horizon.json").read_bytes()
    assert stamps == {name: (out / name).stat().st_mtime_ns for name in stamps}
    refused(*command, "--keep", "0.3", words=["another recipe (different keep)", "choose another --out"])
    refused(*command, "--first", "divprune", words=["another recipe (different first)", "choose another --out"])
    lines = questions.read_text()
    questions.write_text(lines.replace("yes", "no"))
    refused(*command, words=["another recipe (different questions)", "choose another --out"])
    questions.write_text(lines)

    ask = [
        "prune",
        "miniature",
        "--recipe",
        out,
        "--image",
        scenes / "000000.png",
        "--ask",
        "read the number.",
        "--json",
    ]
    code, said, _ = run(*ask)
    by_parts = [*ask[:2], "--schedule", out / "schedule.json", "--codebook", out / "codebook", *ask[4:]]
    assert code == 0 and json.loads(said) == json.loads(run(*by_parts)[1])
    refused(*ask, "--schedule", "random", words=["--recipe has a schedule", "leave --schedule and --codebook out"])
    record = json.loads((out / "recipe.json").read_text())
    (out / "recipe.json").write_text(json.dumps(record | {"complete": False}))
    refused(*ask, words=["is not finished: run `codebook tune` again"])


def test_a_second_one_at_once_is_refused(refused, scenes, questions, tmp_path, monkeypatch):
    """Also one of another recipe, begun after the first look at the folder."""
    monkeypatch.setattr("codebook.cli.build.prepared_build", lambda *_: pytest.fail)
    out, begun = tmp_path / "recipe", {"format_version": 1, "labels": None, "complete": False}
    begun |= {"model": "miniature", "data": str(questions), "keep": 0.2, "count": 20, "seed": 0}
    command = ["tune", "miniature", "--images", scenes, "--data", questions, "--out", out, *COUNT, "--count", "20"]

    def meanwhile(*_):
        (out / "recipe.json").write_text(json.dumps(begun | {"keep": 0.3}))
        return "probability"

    out.mkdir()
    with writing(out, patience=0):
        refused(*command, words=["another process is writing", "wait for it"])
    assert not list(out.iterdir())
    monkeypatch.setattr("codebook.cli.tune._rehearse", meanwhile)
    refused(*command, words=["another recipe (different keep)"])
    assert json.loads((out / "recipe.json").read_text())["keep"] == 0.3


def test_what_cannot_be_tuned(refused, scenes, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    refused(
        "tune", "miniature", "--images", scenes, "--out", tmp_path / "full", words=["not empty and holds no recipe"]
    )
    refused("tune", "miniature", "--images", scenes, "--out", tmp_path / "x", *COUNT, words=["cannot tune: give"])


def test_what_a_later_step_refuses_is_refused_before_the_first(refused, run, scenes, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("codebook.building.build", pytest.fail)
    out = tmp_path / "recipe"
    command = ["tune", "miniature", "--images", scenes, "--out", out, *COUNT, "--count", "20", "--data"]
    refused(*command, questions, "--keep", "0.001", words=["keep 0.001 is out of reach", "choose from 0.007"])  # 1/144
    for field, value, words in (
        ("question", "is there a <image>?", ["question 25", "'<image>', a special token"]),
        ("task", "mean", ["called `mean`"]),
    ):
        lines = list(map(json.loads, questions.read_text().splitlines()))
        lines[24:] = [line | {field: value} for line in lines[24:]]
        odd = tmp_path / f"{field}.jsonl"
        odd.write_text("".join(json.dumps(line) + "\n" for line in lines))
        refused(*command, odd, words=words)
    with monkeypatch.context() as bare:
        bare.setitem(sys.modules, "matplotlib", None)
        refused(*command, questions, words=["matplotlib"])
    for options, words in (
        (["--select", "2"], ["select is 2.0"]),
        (["--images", tmp_path / "nowhere"], ["no such folder"]),
        (["--prompt", "is there a <image>?"], ["'<image>', a special token"]),
        (["--workers", "3"], ["add --engine ray"]),
        (["--first", "divprune+random"], ["one method alone"]),
        (["--first", "divprune", "--first", "evs"], ["evs", "cannot be tried on this data"]),
    ):
        refused(*command, questions, *options, words=words)
    assert not out.exists()


def test_the_horizon_of_a_model_that_shares_no_prefill(run, scenes, questions, tmp_path, monkeypatch):
    class Measured(BaseException):
        pass

    def refuse(*_):
        raise UnsharedError("as deepstack does")

    def measure(metric, **_):
        raise Measured(metric)

    monkeypatch.setattr("codebook.cli.build.prepared_build", lambda *_: lambda as_json: None)
    monkeypatch.setattr("codebook.cli.tune._labelled", lambda *_: ("given", [questions] * 2))
    monkeypatch.setattr("codebook.cli.horizon.horizon_command", measure)
    command = ["tune", "miniature", "--images", scenes, "--data", questions, *COUNT, "--count", "20", "--out"]
    with pytest.raises(Measured, match="probability"):
        run(*command, tmp_path / "shared")
    monkeypatch.setattr("codebook.analysis.prefill.Prefill.of", refuse)
    with pytest.raises(Measured, match="generated"):
        run(*command, tmp_path / "unshared")
