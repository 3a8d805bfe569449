"""How a model is loaded: the same options on every command that takes one, refused before it is read."""

import json

import pytest
from PIL import Image
from typer.main import get_command

from codebook.cli import app
from codebook.errors import CodebookError
from codebook.miniature.scenes import scene
from tests.store.films import clip

OPTIONS = {"--device", "--dtype", "--device-map", "--attn", "--revision"}
LOADING = {
    "bench": ["miniature", "--methods", "random", "--out", "out"],
    "build": ["miniature", "--images", "images", "--out", "out"],
    "calibrate": ["miniature", "--data", "miniature", "--keep", "0.2", "--out", "out.json"],
    "explain": ["miniature", "--image", "a.png", "--patch", "1,1"],
    "extend": ["miniature", "--images", "images", "--out", "out"],
    "horizon": ["miniature", "--data", "miniature"],
    "check": ["miniature"],
    "prune": ["miniature", "--image", "a.png", "--ask", "describe."],
    "serve": ["miniature"],
    "show": ["miniature", "--image", "a.png", "--ask", "describe.", "--methods", "random"],
    "tune": ["miniature", "--images", "images", "--data", "miniature", "--out", "out"],
}
"""Commands that load any model, and words with which they would."""


def test_every_command_with_any_model_has_them():
    commands = get_command(app).commands
    having = {name for name, one in commands.items() if {o for p in one.params for o in p.opts} >= OPTIONS}
    assert having == set(LOADING)
    named = {name for name, one in commands.items() if any(p.opts == ["model"] for p in one.params)}
    assert named - having == {"vllm-args"}  # vLLM loads it


@pytest.mark.parametrize("name", LOADING)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--dtype", "int8"], ["no dtype 'int8'", "bfloat16"]),
        (["--attn", "flash"], ["attention 'flash' is not supported on cpu", "sdpa"]),
        (["--device-map", "everywhere"], ["no device_map 'everywhere'", "auto"]),
        (["--device", "cpu", "--device-map", "auto"], ["both say where the model goes"]),
        (["--revision", "main"], ["miniature is on this machine", "leave it out"]),
    ],
)
def test_wrong_values_are_refused_before_the_work(refused, monkeypatch, tmp_path, name, given, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("codebook.models.loading.load", pytest.fail)
    Image.new("RGB", (96, 96)).save("a.png")
    refused(name, *LOADING[name], *given, words=words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


def test_without_a_model_they_mean_nothing(refused):
    refused(
        "prune", "--tokens", "t", "--codebook", "b", "--output", "o", "--dtype", "auto", words=["--dtype", "--tokens"]
    )
    refused("serve", "--codebook", "miniature", "--revision", "main", words=["--revision needs a MODEL"])


CLIPS = {
    "bench": ["--methods", "random", "--out", "out", "--data", "clips.jsonl"],
    "calibrate": ["--data", "clips.jsonl", "--keep", "0.2", "--out", "out.json"],
    "horizon": ["--data", "clips.jsonl"],
    "prune": ["--video", "a.mp4", "--ask", "describe."],
    "tune": ["--images", ".", "--data", "clips.jsonl", "--out", "out"],
}
"""Commands that show clips, and words with which they do."""


@pytest.mark.parametrize("name", CLIPS)
def test_the_frames_of_clips_are_those_of_the_revision_that_is_loaded(refused, monkeypatch, tmp_path, name):
    pytest.importorskip("av")

    def load_processor(model, **options):
        raise CodebookError(f"asked for {model} with {options}: end here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("codebook.inference.frames.load_processor", load_processor)
    clip(tmp_path / "a.mp4", count=2, size=(16, 16))
    Image.new("RGB", (16, 16)).save("a.png")
    record = {"video": "a.mp4", "question": "describe.", "answer": "grey"}
    (tmp_path / "clips.jsonl").write_text(json.dumps(record) + "\n")
    refused(name, "owner/name", *CLIPS[name], "--revision", "v1", words=["owner/name with {'revision': 'v1'}"])


def test_an_answer_with_all_of_them(run, tmp_path):
    pytest.importorskip("accelerate")
    Image.fromarray(scene("test", 0, 0, 0).pixels).save(tmp_path / "a.png")
    ask = ["prune", "miniature", "--image", tmp_path / "a.png", "--ask", "describe.", "--json"]
    plain, asked = (
        json.loads(run(*ask, *options)[1])
        for options in ([], ["--device-map", "auto", "--attn", "eager", "--dtype", "float32"])
    )
    assert plain == asked
