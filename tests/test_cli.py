"""The command line: answers on stdout, one-line errors on stderr, exit code 2, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from codebook import Codebook, CodebookError, miniature, models
from codebook.building.sheet import sheet

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return miniature.write_images(tmp_path_factory.mktemp("scenes"), 3)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A codebook that is no model's: dimension 4, two prototypes."""
    folder = tmp_path_factory.mktemp("book") / "foreign"
    Codebook(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]), config={"fingerprint": "llava:1-00:1-00"}).save(folder)
    return folder


def test_one_image(run, scenes, tmp_path):
    ask = ["prune", "miniature", "--image", scenes[0], "--ask", "describe.", "--keep", 0.25, "--method", "uniform"]
    code, out, _ = run(*ask, "--json", "--show", tmp_path / "kept.png")
    report = json.loads(out)
    assert code == 0 and report["keep"] == 0.25 and report["counts"] == [36] * len(report["counts"])
    side = range(1, 12, 2)
    assert report["kept"] == [[12 * row + col for row in side for col in side]]
    assert Image.open(tmp_path / "kept.png").width > 576 and os.listdir(tmp_path) == ["kept.png"]
    code, out, err = run(*ask)
    assert code == 0 and out.strip() == report["answer"]
    plan, cost = err.splitlines()[-2:]
    assert plan.endswith(": 36 of 144 visual tokens in layers 0-11")
    assert cost.startswith("on average 25.0% of the tokens, ") and cost.endswith(" KiB of KV cache per image")


def test_prebuilt_codebook_is_found_by_default(run, scenes):
    code, out, _ = run("prune", "miniature", "--image", scenes[0], "--ask", "describe.", "--keep", 0.1, "--json")
    assert code == 0 and len(json.loads(out)["kept"][0]) == 14


def test_schedule_text_and_several_images(run, scenes):
    code, out, _ = run(
        "prune", "miniature", "--image", scenes[0], "--image", scenes[1], "--ask", "describe.",
        "--schedule", "codebook:0.5,random@6:10", "--json",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0 and report["counts"] == [72] * 6 + [10] * 6 and [len(k) for k in report["kept"]] == [10, 10]
    assert report["schedule"] == "codebook:0.5, random@6:10"
    assert report["kv_bytes"] == 2 * 160 * 4 * 6 * (72 + 10)  # keys and values, 160 wide, fp32


def test_images_keep_by_their_spread(run, scenes, tmp_path):
    Image.new("RGB", (96, 96), "gray").save(plain := tmp_path / "plain.png")
    ask = ["prune", "miniature", "--image", plain, "--image", scenes[0], "--image", scenes[1], "--ask", "describe."]
    code, out, _ = run(*ask, "--schedule", "seeded; spread=codebook", "--keep", 0.25, "--json")
    report = json.loads(out)
    usual = Codebook.load(ROOT / "indexes" / "miniature").config["spread"]
    assert code == 0 and report["schedule"] == f"codebook-farthest:0.25+mass; spread={usual}"
    kept = [len(k) for k in report["kept"]]
    assert kept[0] == 18 < kept[1] and "counts" not in report  # half of 36: nothing is as plain as gray
    code, _, err = run(*ask, "--schedule", "seeded; spread=codebook", "--keep", 0.25)
    assert code == 0 and f"kept {kept[0]}, {kept[1]}, {kept[2]} of 144" in err
    code, _, err = run(*ask, "--show", tmp_path / "kept.png")
    assert code == 0 and f"picture: {tmp_path}/kept.png, {tmp_path}/kept-2.png, {tmp_path}/kept-3.png" in err
    drawn = [str(tmp_path / f"{name}.png") for name in ("again", "again-2", "again-3")]
    report = json.loads(run(*ask, "--show", drawn[0], "--json")[1])
    assert report["pictures"] == drawn and all(map(os.path.isfile, drawn))
    (tmp_path / "in.jsonl").write_text(json.dumps({"image": str(plain), "question": "describe."}))
    files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    code, _, err = run("prune", "miniature", *files, "--schedule", "seeded; spread=codebook", "--keep", 0.25)
    assert code == 0 and "images keep numbers of their own of 144 visual tokens" in err
    assert json.loads((tmp_path / "out.jsonl").read_text())["kept"] == [18]


def test_presets_are_fitted_to_the_budget(run, scenes, tmp_path):
    ask = ["prune", "miniature", "--image", scenes[0], "--ask", "describe.", "--json"]
    report = json.loads(run(*ask, "--schedule", "uniform+random@6:10; positions=compact", "--keep", 0.25)[1])
    # 12 layers of 144: 0.25 is 432 tokens in one layer; 6 * (62 + 10) = 432
    assert report["counts"] == [62] * 6 + [10] * 6 and report["keep"] == 0.25
    assert report["schedule"] == "uniform:0.431, random@6:10; positions=compact"
    (tmp_path / "plan.json").write_text(json.dumps({"format": 1, "schedule": "uniform:62, random@6:10"}))
    again = json.loads(run(*ask, "--schedule", tmp_path / "plan.json")[1])
    assert again["counts"] == report["counts"] and again["kept"] == report["kept"]
    default = json.loads(run(*ask, "--schedule", "uniform")[1])
    assert default["counts"] == [28] * 12  # 0.2 of 144 is 28.8
    early = json.loads(run(*ask, "--schedule", "fastv+random@2", "--keep", 0.25)[1])
    assert (
        early["schedule"].startswith("fastv@1:") and early["counts"][0] == 144 > early["counts"][1] > early["counts"][2]
    )
    assert json.loads(run(*ask, "--schedule", "vtw", "--keep", 0.5)[1])["counts"] == [144] * 6 + [0] * 6
    seeded = json.loads(run(*ask, "--schedule", "seeded", "--keep", 0.25)[1])
    assert seeded["schedule"] == "codebook-farthest:0.25+mass" and len(seeded["kept"][0]) == 36


def test_batch_mode_equals_one_by_one_and_survives_a_broken_image(run, scenes, tmp_path):
    (tmp_path / "cut.png").write_bytes(scenes[0].read_bytes()[:300])
    questions = [
        {"id": i, "image": str(image), "question": question}
        for i, (image, question) in enumerate(
            [(scenes[0], "describe."), (tmp_path / "cut.png", "describe."), (scenes[1], "describe in one word.")]
        )
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, questions)))
    options = ["prune", "miniature", "--input", source, "--output", output, "--keep", 0.3, "--method", "random"]
    code, _, err = run(*options, "--json")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert code == 0 and [row["id"] for row in rows] == [0, 1, 2] and "cut.png" in err
    assert "cut.png" in rows[1]["error"] and "answer" not in rows[1] and rows[0]["kept"] == [43]
    for row in (rows[0], rows[2]):
        alone = ["--image", row["image"], "--ask", row["question"], "--keep", 0.3, "--method", "random"]
        assert run("prune", "miniature", *alone)[1].strip() == row["answer"]

    output.write_text("before")
    assert run(*options, "--strict")[0] == 2
    assert output.read_text() == "before" and len(os.listdir(tmp_path)) == 3


def test_tokens_without_a_model(run, foreign, tmp_path):
    # cosine to the nearest prototype: 1, 0, 0.707, 0.6
    tokens = torch.tensor([[2.0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [0, 3, 0, 4.0]])
    save_file({"tokens": tokens}, tmp_path / "in.safetensors")
    options = ["prune", "--tokens", tmp_path / "in.safetensors", "--codebook", foreign]
    code, out, _ = run(*options, "--output", tmp_path / "out.safetensors", "--keep", 0.5, "--json")
    kept = load_file(tmp_path / "out.safetensors")
    assert code == 0 and json.loads(out) == {"tokens": {"tokens": 4, "kept": 2}}
    assert kept["tokens.index"].tolist() == [1, 3] and torch.equal(kept["tokens"], tokens[[1, 3]])


def test_what_files_call_their_contents_does_not_write_to_the_terminal(run, foreign, scenes, tmp_path):
    """Names of tensors and of a codebook's images, which are printed as results."""
    clear = "\x1b[2J"
    save_file({clear: torch.ones(4, 4)}, tmp_path / "in.safetensors")
    tokens = ["prune", "--tokens", tmp_path / "in.safetensors", "--codebook", foreign]
    code, out, _ = run(*tokens, "--output", tmp_path / "out.safetensors", "--keep", 0.5)
    assert code == 0 and out == "\\x1b[2J: 2 of 4\n"
    own = Codebook.load(ROOT / "indexes" / "miniature")
    Codebook(own.prototypes, [row | {"image": clear} for row in own.provenance], own.config).save(tmp_path / "book")
    explain = ["explain", "miniature", "--image", scenes[0], "--patch", "1,1", "--codebook", tmp_path / "book"]
    code, out, _ = run(*explain)
    assert code == 0 and "\\x1b[2J" in out and clear not in out


def test_tokens_of_another_dimension_or_no_tokens(refused, foreign, tmp_path):
    save_file({"tokens": torch.zeros(3, 5)}, tmp_path / "in.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    rest = ["--codebook", foreign, "--output", tmp_path / "out.safetensors"]
    refused("prune", "--tokens", tmp_path / "in.safetensors", *rest, words=["(3, 5)", "(n, 4)"])
    refused("prune", "--tokens", tmp_path / "bad.safetensors", *rest, words=["safetensors file"])
    refused("prune", "--tokens", tmp_path / "none.safetensors", *rest, words=["no none.safetensors in"])
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("tensors, words", [
    ({"a": torch.ones(2, 4), "a.index": torch.ones(3, 4)}, ["'a'", "'a.index'", "rename"]),
    ({"b": torch.ones(2, 4), "b.index.index": torch.ones(2, 4), "b.index": torch.ones(2, 4)}, ["'b", "rename"]),
    ({}, ["no tensors"]),
    ({"a": torch.tensor([[1.0, 2, 3, float("nan")]])}, ["'a'", "NaN"]),
    ({"a": torch.tensor([[1.0, 2, 3, float("inf")]])}, ["'a'", "infinite"]),
    ({"a": torch.ones(2, 4, dtype=torch.int32)}, ["'a'", "floats"]),
    ({"a": torch.ones(0, 4)}, ["'a'", "(0, 4)"]),
    ({"a": torch.ones(4)}, ["'a'", "(4,)"]),
])  # fmt: skip
def test_tensors_that_would_get_lost_or_mean_nothing(refused, foreign, tmp_path, tensors, words):
    save_file(tensors, tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"
    refused("prune", "--tokens", tmp_path / "in.safetensors", "--codebook", foreign, "--output", output, words=words)
    assert not output.exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_tokens_keep_their_dtype(run, foreign, tmp_path, dtype):
    tokens = torch.tensor([[2.0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [0, 3, 0, 4.0]]).to(dtype)
    save_file({"a": tokens, "index": tokens.clone()}, tmp_path / "in.safetensors")
    files = ["--tokens", tmp_path / "in.safetensors", "--output", tmp_path / "out.safetensors"]
    code, _, err = run("prune", *files, "--codebook", foreign, "--keep", 0.5)
    assert code == 0, err
    kept = load_file(tmp_path / "out.safetensors")
    assert set(kept) == {"a", "a.index", "index", "index.index"} and kept["a.index"].tolist() == [1, 3]
    assert kept["a"].dtype == dtype and torch.equal(kept["a"].float(), tokens.float()[[1, 3]])


@pytest.mark.parametrize("keep", ["0", "1.5", "nan", "-0.1"])
def test_impossible_keep(refused, keep):
    refused("prune", "miniature", "--image", "x.png", "--ask", "?", "--keep", keep, words=["keep must be", keep])


def test_a_count_and_an_empty_method_are_not_taken_for_something_else(refused):
    ask = ["prune", "miniature", "--image", "x.png", "--ask", "?"]
    refused(*ask, "--keep", "64", words=["a count is said in a schedule, without a point, as in random:64"])
    for option in ("--method", "--schedule"):  # as a script has it whose variable is not set
        refused(*ask, option, "", words=["write method[(option=value)][@layer][:keep]"])


@pytest.mark.parametrize(
    "options,words",
    [
        (["--schedule", "uniform@40:0.5"], ["layer 40", "0 to 11"]),
        (["--schedule", "unifrom:0.5"], ["unifrom", "uniform"]),
        (["--ask", " "], ["the question is empty: write one"]),
        (["--method", "magic"], ["'magic': `codebook list` names all"]),
        (["--schedule", "fastv", "--keep", "0.01"], ["out of reach", "0.0897"]),
        (["--schedule", "uniform:9", "--keep", "0.1"], ["no fraction"]),
        (["--schedule", "nowhere.json"], ["nowhere.json"]),
        (["--positions", "shuffled"], ["shuffled"]),
        (["--codebook", "nowhere"], ["nowhere", "codebook build"]),
        (["--tokens", "x.safetensors"], ["MODEL does not go with --tokens"]),
        (["--input", "x.jsonl", "--output", "y"], ["--image does not go with --input"]),
    ],
)
def test_impossible_options(refused, scenes, options, words):
    refused("prune", "miniature", "--image", scenes[0], "--ask", "?", *options, words=words)


def test_codebook_of_another_model(refused, foreign, scenes):
    refused("prune", "miniature", "--image", scenes[0], "--ask", "?", "--codebook", foreign, words=["another tower"])


def test_codebook_with_a_flipped_bit(refused, foreign, tmp_path):
    copy = tmp_path / "copy"
    Codebook.load(foreign).save(copy)
    data = bytearray((copy / "prototypes.safetensors").read_bytes())
    data[-3] ^= 1
    (copy / "prototypes.safetensors").write_bytes(data)
    refused("inspect", copy, words=["prototypes.safetensors", "damaged"])


def test_unreadable_input_files(refused, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    refused("prune", "miniature", "--image", tmp_path / "text.png", "--ask", "?", words=["text.png", "PNG"])
    refused("prune", "miniature", "--image", tmp_path / "no.png", "--ask", "?", words=["no such image"])
    (tmp_path / "in.jsonl").write_text('{"image": "a.png", "question": "?"}\n{"image": 3}\n')
    out = ["--output", tmp_path / "out.jsonl"]
    refused("prune", "miniature", "--input", tmp_path / "in.jsonl", *out, words=["line 2", "question"])
    refused("prune", "miniature", "--input", tmp_path / "no.jsonl", *out, words=["no.jsonl"])
    assert not (tmp_path / "out.jsonl").exists()


def test_unsupported_model(refused, tmp_path):
    from transformers import MllamaConfig

    MllamaConfig().save_pretrained(tmp_path)
    refused("prune", tmp_path, "--image", ROOT / "x.png", "--ask", "?", words=["no such image"])
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    refused("prune", tmp_path, "--image", tmp_path / "x.png", "--ask", "?", words=["mllama", "cross-attend"])


def test_list_and_inspect(run):
    code, out, _ = run("list", "--json")
    [_, shipped], methods = json.loads(out)["codebooks"], json.loads(out)["methods"]
    assert code == 0 and shipped["model"] == "miniature" and {"codebook", "drop", "random"} <= set(methods)
    assert "pyramiddrop" in json.loads(out)["presets"] and "miniature" in run("list")[1]
    assert json.loads(out)["presets"]["seeded"] == "codebook-farthest+mass"
    code, out, _ = run("inspect", shipped["folder"], "--json")
    report = json.loads(out)
    assert code == 0 and sum(c["prototypes"] for c in report["clusters"]) == report["prototypes"] > 0
    assert "fingerprint" not in report
    code, out, _ = run("inspect", "miniature")
    lines = out.splitlines()
    assert code == 0 and all(len(line) <= 80 for line in lines if not line.startswith("folder"))
    assert "prototypes  469 of dimension 160" in lines and "thresholds  P1 below 0.6, JSD below 0.1" in lines
    assert "  recurrent                    469   16.3%" in lines and "8                  136       43" in lines


def test_starting_the_command_line_imports_neither_torch_nor_faiss():
    probe = "import sys, codebook.cli; print([m for m in ('torch', 'faiss', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", probe], text=True).strip() == "[]"


def test_readme_python_example_runs(tmp_path):
    """The five lines as they stand in the README."""
    text = (ROOT / "README.md").read_text()
    code = text.split("## In Python")[1].split("```python\n")[1].split("```")[0]
    miniature.write_images(tmp_path / "scenes", 1)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def build(images, out, *options):
    return ["build", "miniature", "--images", images, "--out", out, "--candidates", "tiles", *options]


def test_build_skips_broken_images_and_says_so(run, refused, tmp_path):
    images = tmp_path / "images"
    good = miniature.write_images(images, 3)
    (images / "000001-cut.png").write_bytes(good[0].read_bytes()[:200])
    loose = ["--tau-p", 1, "--tau-j", 99]  # so that three images leave prototypes
    refused(*build(images, tmp_path / "strict", *loose, "--strict"), words=["000001-cut.png"])
    code, out, err = run(*build(images, tmp_path / "book", *loose, "--json"))
    report = json.loads(out)
    assert code == 0 and "skipped unreadable image: 000001-cut.png (image file is truncated)" in err
    assert report["skipped"] == ["000001-cut.png"] and report["used"] == 3
    assert list(report["funnel"]) == ["probed", "isolated", "P1", "JSD", "recurrent"]
    assert report["prototypes"] == len(Codebook.load(tmp_path / "book")) == report["funnel"]["recurrent"] > 0
    code, out, _ = run("inspect", tmp_path / "book")
    assert code == 0 and "tokens left by each step" in out
    refused(*build(images, tmp_path / "book", "--tau-p", 1, "--tau-j", 98), words=["another build", "tau_j", "--out"])
    (tmp_path / "book" / "images.jsonl").write_text('{"image": "000001-cut.png", "error": "made up"}')
    refused(*build(images, tmp_path / "book", *loose), words=["images.jsonl"])


def test_extend_merge_and_sheet(run, refused, tmp_path):
    """Two scenes, then two more, or two and two: the codebook of four, and the picture of where it came from."""
    scenes = miniature.write_images(tmp_path / "all", 4)
    for name, own in (("a", scenes[:2]), ("b", scenes[2:])):
        (tmp_path / name).mkdir()
        for path in own:
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    loose = ["--tau-p", 1, "--tau-j", 99, "--dtype", "float32", "--batch", 8]
    for name in ("all", "a", "b"):
        assert run(*build(tmp_path / name, tmp_path / f"book-{name}", *loose))[0] == 0
    more = ["--images", tmp_path / "b", "--out", tmp_path / "ext", "--batch", 8, "--json"]
    code, out, _ = run("extend", tmp_path / "book-a", *more)
    assert code == 0 and json.loads(out)["used"] == 4
    assert run("merge", tmp_path / "book-a", tmp_path / "book-b", "--out", tmp_path / "merged")[0] == 0
    for path in (tmp_path / "book-all").iterdir():
        for name in ("ext", "merged"):
            assert (tmp_path / name / path.name).read_bytes() == path.read_bytes()
    picture = tmp_path / "sheet.png"
    shown = ["inspect", tmp_path / "ext", "--sheet", picture]
    assert run(*shown, "--images", tmp_path / "a", "--images", tmp_path / "b")[0] == 0
    assert Image.open(picture).width > 1000
    picture.unlink()
    refused(*shown, words=["--sheet needs --images"])
    refused(*shown, "--images", tmp_path / "nowhere", words=["no such folder"])
    refused("extend", tmp_path / "none", "--images", tmp_path / "b", "--out", tmp_path / "x", words=["no codebook in"])
    books = json.loads(run("list", "--json")[1])["codebooks"]
    prebuilt = next(book for book in books if book["name"] == "miniature")
    refused("merge", tmp_path / "ext", prebuilt["folder"], "--out", tmp_path / "x", words=["another", "do not merge"])
    shutil.copytree(prebuilt["folder"], tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    for name in ("survivors.safetensors", "images.jsonl"):
        (tmp_path / "bare" / name).unlink()
        del config["sha256"][name]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    refused("merge", tmp_path / "ext", tmp_path / "bare", "--out", tmp_path / "x", words=["survivors", "again"])
    refused(*build(tmp_path / "a", tmp_path / "x", "--dtype", "int8"), words=["int8", "bfloat16"])
    assert not (tmp_path / "x").exists() and not picture.exists()


def test_build_without_images_or_prototypes(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(*build(tmp_path / "empty", tmp_path / "book"), words=["no image", ".png"])
    refused(*build(tmp_path / "nowhere", tmp_path / "book"), words=["no such folder"])
    miniature.write_images(tmp_path / "images", 2)
    strict = ["--tau-p", 1e-9]
    refused(
        *build(tmp_path / "images", tmp_path / "book", *strict), words=["no prototype", "probed 32", "P1 0", "tau_p"]
    )
    assert not (tmp_path / "book").exists()
    refused(*build(tmp_path / "images", tmp_path / "book", "--tau-p", 2), words=["tau_p is 2"])
    refused(*build(tmp_path / "images", tmp_path / "book", "--preset", "gpt"), words=["gpt", "llava-1.5-7b"])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_full_disk_is_one_line_and_loses_nothing(run, refused, tmp_path):
    images, disk = tmp_path / "images", tmp_path / "disk"
    miniature.write_images(images, 4)
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    options = ["--tau-p", 1, "--tau-j", 99]
    try:
        filler = disk / "filler"
        filler.write_bytes(b"x" * 140_000)
        refused(*build(images, disk / "book", *options), words=["free space", "kept"])
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        code, _, _ = run(*build(images, disk / "book", *options))
        run(*build(images, tmp_path / "book", *options))
        assert code == 0
        for name in ("config.json", "prototypes.safetensors", "provenance.jsonl", "README.md"):
            assert (disk / "book" / name).read_bytes() == (tmp_path / "book" / name).read_bytes()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_codebook_does_not_choose_the_model_that_is_loaded(run, refused, tmp_path, monkeypatch):
    """Its words may be anyone's: a model that does not ship is loaded only when the user names it."""
    scenes = miniature.write_images(tmp_path / "scenes", 3)
    loose = ["--candidates", "tiles", "--tau-p", "1", "--tau-j", "99"]
    folder, weights = tmp_path / "book", tmp_path / "mine"
    shutil.copytree(models.SHIPPED_MODELS["miniature"], weights)
    assert run("build", weights, "--preset", "miniature", "--images", scenes[0].parent, "--out", folder, *loose)[0] == 0
    more = miniature.write_images(tmp_path / "more", 2, seed=5)[0].parent
    command = ["extend", folder, "--images", more, "--out", tmp_path / "larger"]
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", None)
        refused(*command, words=[f"built for '{weights}'", "--model NAME"])
        config = json.loads((folder / "config.json").read_text()) | {"model": "someone/elses-model"}
        (folder / "config.json").write_text(json.dumps(config))
        refused(*command, words=["'someone/elses-model'", "--model NAME"])
    code, _, err = run(*command, "--model", weights)
    assert code == 0, err
    assert len(Codebook.load(tmp_path / "larger")) > 0


def test_prototypes_that_do_not_say_where_they_are_from(run, tmp_path):
    """As those that `Codebook.extend` adds: they are counted, and have no place in a sheet."""
    book = Codebook(torch.eye(4), [{"image": "a.png", "row": 0, "col": 1, "cluster": 0}, *[{"cluster": 0}] * 3])
    book.save(tmp_path / "book")
    code, out, _ = run("inspect", tmp_path / "book", "--json")
    assert code == 0 and json.loads(out)["clusters"] == [{"cluster": 0, "prototypes": 4, "images": 1}]
    with pytest.raises(CodebookError, match="leave --sheet out"):
        sheet(book.provenance, (2, 2), [], "title")
