"""`codebook horizon` and `codebook calibrate`, end to end on the embedded model."""

import json

import pytest

from codebook.miniature.samples import of_miniature


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Eighteen questions of two tasks, those of one without answers."""
    folder = tmp_path_factory.mktemp("data")
    samples = [s for s in of_miniature("train", 3, 9) if s.task in ("exist", "attr")]
    with (folder / "data.jsonl").open("w") as out:
        for i, sample in enumerate(samples):
            sample.pictures()[0].save(folder / f"{i}.png")
            answer = {"answer": sample.answer} if sample.task == "attr" else {}
            record = {"image": f"{i}.png", "question": sample.question, "task": sample.task} | answer
            out.write(json.dumps(record) + "\n")
    return folder / "data.jsonl"


def test_horizon(run, refused, file, tmp_path):
    out = tmp_path / "out"
    code, shown, _ = run("horizon", "miniature", "--data", file, "--out", out)
    assert code == 0 and shown.splitlines()[0].split()[:3] == ["task", "samples", "unpruned"]
    assert {"attr", "exist", "mean"} <= {line.split()[0] for line in shown.splitlines() if line}
    report = json.loads((out / "horizon.json").read_text())
    assert (report["samples"], report["labelled"], report["layers"]) == (18, 9, 12)
    assert (report["data"], report["split"]) == ("data.jsonl", None)  # its name alone: codebooks are shared with this
    assert report["horizons"]["exist"]["full"] > 0.5 and len(report["horizons"]["mean"]["loss"]) == 12
    assert (out / "horizon.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["first-token.sqlite", "horizon.json", "horizon.png"]
    other, whole = ["horizon", "miniature", "--data", file, "--out", out, "--metric", "accuracy"], out / "horizon.json"
    before = whole.read_bytes()
    refused(*other, words=["horizon.json is of the metric probability", "another --out"])
    assert whole.read_bytes() == before
    whole.rename(out / "probability.json")
    code, again, _ = run(*other, "--json")
    assert code == 0 and json.loads(again)["cost"] == {"processed": 0, "naive": 0}  # all from the journal
    assert json.loads(again)["horizons"]["exist"]["full"] == 1  # the model's own answers


def test_calibrate_and_prune_with_what_it_wrote(run, file, tmp_path):
    out = tmp_path / "schedule.json"
    given = ("--data", file, "--method", "divprune", "--first", "uniform", "--keep", "0.1", "--out", out)
    given += ("--first", "divprune@0; positions=keep", "--first", "uniform")  # each again, spelt another way or not
    code, shown, err = run("calibrate", "miniature", *given, "--json")
    assert code == 0, err
    report = json.loads(shown)
    assert report["plain"] == "divprune:0.1" and report["keep"] <= 0.1 and report["best"] in report["rounds"][-1]
    tried = report["rounds"][0]
    assert {"divprune:0.1", "uniform:0.1"} <= tried.keys()
    assert {name.split(":")[0] for name in tried if "," in name} == {"divprune", "uniform"}
    assert report["confirmed"] == (report["schedule"] != report["plain"])
    assert list(tmp_path.iterdir()) == [out]
    code, answer, _ = run("prune", "miniature", "--schedule", out, "--image", file.parent / "0.png", "--ask",
                          "is there a red circle?", "--json")  # fmt: skip
    assert code == 0 and json.loads(answer)["schedule"] == report["schedule"]


def test_data_as_for_bench(run, refused, tmp_path, monkeypatch):
    """The miniature's own questions are the default, and one family of them has a name."""
    code, shown, err = run("horizon", "miniature", "--data", "miniature:ocr", "--count", 2, "--json")
    assert code == 0, err
    report = json.loads(shown)
    assert (report["data"], report["samples"], list(report["horizons"])) == ("miniature:ocr", 2, ["ocr"])
    monkeypatch.setattr("codebook.models.loading.load", pytest.fail)
    asked = []
    monkeypatch.setattr("codebook.analysis.calibration.check_sample_count", lambda samples: asked.extend(samples))
    for data, families in (([], 11), (["--data", "miniature:exist"], 1)):
        asked.clear()
        with pytest.raises(pytest.fail.Exception):
            run("calibrate", "miniature", "--keep", "0.1", "--count", 2, "--out", tmp_path / "s.json", *data)
        assert len({sample.task for sample in asked}) == families and len(asked) == 2 * families


@pytest.mark.parametrize(("argv", "words"), [
    (["horizon", "miniature", "--data", "DATA", "--metric", "bleu"], ["no metric 'bleu'", "probability"]),
    (["horizon", "miniature", "--data", "nowhere.jsonl"], ["no data 'nowhere.jsonl'", "miniature:FAMILY, or a JSONL"]),
    (["horizon", "miniature", "--data", "miniature:smell"], ["no task family", "'smell'", "exist"]),
    (["calibrate", "miniature", "--data", "miniature:turns", "--keep", "0.1", "--out", "s.json"],
     ["miniature:turns has earlier questions", "leave them out"]),
    (["calibrate", "miniature", "--data", "miniature:ocr", "--count", "17", "--keep", "0.1", "--out", "s.json"],
     ["17 samples cannot calibrate", "18 at least"]),
    (["calibrate", "miniature", "--count", "5", "--keep", "0.1", "--out", "s.json"], ["too few samples to confirm"]),
    (["horizon", "miniature", "--data", "miniature", "--split", "all"], ["all"]),
    (["horizon", "miniature", "--data", "DATA", "--count", "3"], ["--count is for the miniature's", "leave it out"]),
    (["horizon", "miniature", "--data", "DATA", "--split", "test"], ["--split is for the miniature's", "leave it out"]),
    (["calibrate", "miniature", "--data", "DATA", "--count", "3", "--keep", "0.1", "--out", "s.json"],
     ["--count is for the miniature's", "leave it out"]),
    (["calibrate", "miniature", "--data", "DATA", "--keep", "0.1", "--out", "schedule"], ["name a .json file"]),
    (["calibrate", "miniature", "--data", "DATA", "--keep", "0.1", "--out", "no/where.json"], ["no folder no"]),
    (["calibrate", "miniature", "--data", "DATA", "--keep", "1.5", "--out", "s.json"], ["keep must be"]),
    (["calibrate", "miniature", "--data", "DATA", "--keep", "0.1", "--out", "s.json", "--method", "vtw"],
     ["one method"]),
    (["calibrate", "miniature", "--data", "DATA", "--keep", "0.1", "--out", "s.json", "--first", "magic"],
     ["no method 'magic'"]),
    (["calibrate", "miniature", "--data", "DATA", "--keep", "0.1", "--out", "s.json", "--deep", "magic@3"],
     ["no method 'magic'"]),
    (["calibrate", "miniature", "--data", "DATA", "--keep", "0.1", "--out", "s.json", "--deep", "downsample"],
     ["downsample", "before the LLM only"]),
    (["calibrate", "miniature", "--data", "DATA", "--keep", "0.1", "--out", "s.json", "--first", "codebook+random"],
     ["one method alone", "'codebook+random'"]),
    (["bench", "miniature", "--methods", "uniform+downsample", "--out", "out"], ["downsample", "before the LLM only"]),
])  # fmt: skip
def test_refusals_are_one_line(run, file, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("codebook.models.loading.load", pytest.fail)
    code, out, err = run(*[file if a == "DATA" else a for a in argv])
    assert code == 2 and not out and not list(tmp_path.iterdir())
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), err
    assert "Traceback" not in err
