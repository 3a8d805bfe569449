"""`codebook bench`, `show` and `explain` from the command line."""

import json

import pytest
from PIL import Image

from codebook import Codebook, miniature
from codebook.store.registry import index_folder
from tests.journals import read_journal


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return miniature.write_images(tmp_path_factory.mktemp("scenes"), 1)[0]


def test_bench_writes_results_and_a_report(run, refused, scene, tmp_path):
    rows = [{"image": str(scene), "question": "describe.", "answer": "red circle", "task": "cap"}]
    rows.append({"image": str(scene), "question": "describe in one word.", "answers": ["circle", "square"]})
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    options = ["bench", "miniature", "--data", data, "--keep", "0.25", "--seeds", 1, "--seconds", 0, "--out", out]
    code, printed, err = run(*options, "--methods", "codebook, fastv@2", "--part", "1/2")
    assert (code, printed) == (0, "") and "part 1 of 2" in err and not (out / "results.json").exists()
    _, first = read_journal(out / "answers-1-of-2.sqlite")
    code, printed, err = run(*options, "--methods", "codebook, fastv@2")
    results = json.loads((out / "results.json").read_text())
    assert code == 0 and results["format"] == 1 and list(results["tasks"]) == ["cap", "all"]
    assert [row["method"] for row in results["rows"]] == [
        "unpruned", "codebook", "fastv@2", "random", "uniform", "downsample",
    ]  # fmt: skip
    assert "| codebook |" in printed and "report.html" in err and (out / "report.html").read_text().endswith("</html>")
    _, answers = read_journal(out / "answers.sqlite")
    assert len(answers) == len(first) == 6  # one of the two questions each
    (tmp_path / "own.json").write_text('{"format": 1, "schedule": "fastv@2"}')
    code, printed, _ = run(
        *options, "--methods", "codebook,fastv@2,uniform", "--against", tmp_path / "own.json", "--json"
    )
    again = json.loads(printed)
    assert again["against"] == "fastv@2" and "against" in again["rows"][1] and "against" not in again["rows"][2]
    assert code == 0 and read_journal(out / "answers.sqlite")[1] == answers  # uniform had been there as a baseline
    means, before = ({row["method"]: row["mean"] for row in rows["rows"]} for rows in (again, results))
    assert means == before and len(means) == 6
    curve = {"loss": [0.5, 0.0], "error": [0.1, None], "layer": 1, "interval": [1, 2], "safe": 2}
    other = {"eps": 0.01, "start": 0, "horizons": {"exist": curve}, "fingerprint": "llava:1-00:1-00:1-00"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    own = ["--methods", "codebook", "--horizon", tmp_path / "other.json"]
    refused(*options, *own, words=["other.json is of another model"])
    (out / "horizon.json").write_text("{}")
    refused(*options, "--methods", "codebook", words=["horizon.json", "codebook horizon"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "magic"], ["no method 'magic'"]),
        (["--methods", ","], ["name a method"]),
        (["--methods", "uniform", "--keep", "half"], ["'half'", "0.5,0.25"]),
        (["--methods", "uniform", "--keep", "0.5,2"], ["keep must be"]),
        (["--methods", "uniform", "--data", "gqa"], ["gqa:FOLDER"]),
        (["--methods", "uniform", "--part", "3/2"], ["'3/2'", "1/4"]),
        (["--methods", "uniform", "--throughput", "1,0"], ["'1,0'", "1,8,32"]),
        (["--methods", "fastv@11, divprune@11", "--keep", "0.1"], ["no method is left to measure", "out of reach"]),
        (["--methods", "uniform", "--against", "unpruned"], ["every row is compared with the unpruned model as it is"]),
        (["--methods", "uniform", "--against", "codebook"], ["--against codebook", "--methods"]),
    ],
)
def test_bench_refuses(refused, tmp_path, options, words):
    refused("bench", "miniature", "--out", tmp_path / "out", *options, words=words)
    assert not (tmp_path / "out").exists()


def test_bench_names_a_question_that_cannot_be_asked_before_it_writes(refused, scene, tmp_path):
    texts = ["read the number.", "is there a <image>?"]
    lines = [json.dumps({"image": str(scene), "question": text, "answer": "yes"}) for text in texts]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines))
    options = ["--data", tmp_path / "odd.jsonl", "--methods", "uniform", "--out", tmp_path / "out"]
    refused("bench", "miniature", *options, words=["question 2", "'<image>', a special token"])
    assert not (tmp_path / "out").exists()


def test_show(run, refused, scene, tmp_path):
    ask = ["show", "miniature", "--image", scene, "--ask", "describe.", "--out", tmp_path / "show.png"]
    code, out, err = run(*ask, "--methods", "uniform,codebook", "--keep", 0.25)
    assert code == 0 and "uniform: 36 of 144" in out and "show.png" in err
    assert Image.open(tmp_path / "show.png").width > 1000
    marks = [line for line in out.splitlines() if "·" in line or "." * 6 in line]
    assert len(marks) == 12
    code, out, _ = run(*ask, "--methods", "uniform", "--keep", 0.25, "--json")
    kept = {row["method"]: row["kept"] for row in json.loads(out)["rows"]}
    side = range(1, 12, 2)
    assert kept == {"unpruned": [list(range(144))], "uniform": [[12 * r + c for r in side for c in side]]}
    code, out, err = run(*ask, "--methods", "uniform@0,seeded,uniform,codebook-farthest+mass", "--keep", 0.25, "--json")
    found = json.loads(out)
    assert code == 0 and [row["method"] for row in found["rows"]] == ["unpruned", "seeded", "uniform"]
    assert [one["method"] for one in found["skipped"]] == ["uniform@0", "codebook-farthest+mass"]
    assert "left out: uniform@0 at 0.25: it is the same as uniform" in err
    (tmp_path / "show.png").unlink()
    refused(*ask, "--methods", "fastv@6", "--keep", 0.1, words=["out of reach"])
    assert not (tmp_path / "show.png").exists()


def test_explain_agrees_with_what_is_pruned(run, refused, scene, tmp_path):
    """A token is explained as kept exactly where the codebook keeps it; both keep 28 of 144 unless told otherwise."""
    ask = ["prune", "miniature", "--image", scene, "--ask", "describe.", "--method", "codebook", "--json"]
    kept = set(json.loads(run(*ask)[1])["kept"][0])
    book = Codebook.load(index_folder() / "miniature")
    for token in (0, 17, max(kept), 143):
        words = ["explain", "miniature", "--image", scene, "--patch", f"{token // 12},{token % 12}"]
        found = json.loads(run(*words, "--json")[1])
        assert found["kept"] == (token in kept) == (found["rank"] > 116)
        nearest = found["neighbours"][0]
        assert len(found["neighbours"]) == 5 and nearest["similarity"] == pytest.approx(found["similarity"], abs=1e-6)
        known = {key: nearest[key] for key in ("image", "row", "col", "p1", "jsd_region", "jsd_global", "cluster")}
        assert known in book.provenance
    code, out, _ = run(*words, "--keep", 0.25)
    assert code == 0 and nearest["image"] in out and f"number {found['rank']} of 144" in out
    picture = tmp_path / "sheet.png"
    refused(*words, "--sheet", picture, words=["--sheet needs --images"])
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    refused(*words, "--sheet", picture, "--images", scenes, words=["no image"])
    for one in found["neighbours"]:
        Image.open(scene).save(scenes / one["image"])
    drawn = ["--sheet", picture, "--images", scenes, "--show", tmp_path / "heat.png"]
    code, _, err = run(*words, *drawn)
    assert code == 0 and Image.open(picture).width > 1000
    assert f"picture: {tmp_path / 'heat.png'}\n" in err and f"sheet: {picture}\n" in err
    code, out, err = run(*words, *drawn, "--json")
    found = json.loads(out)
    assert (found["picture"], found["sheet"]) == (str(tmp_path / "heat.png"), str(picture)) and not err
    refused(*words[:5], "12,0", words=["rows are 0 to 11"])
    refused(*words[:5], "a", words=["ROW,COL"])
