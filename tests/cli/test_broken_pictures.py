"""Pictures that break off in the middle: refused by name before the work, or left out and counted where others do."""

import json

import pytest
from PIL import Image

from codebook import miniature
from codebook.cli.tune import image_questions
from codebook.errors import CodebookError

COMMANDS = {
    "bench": ["bench", "miniature", "--methods", "uniform", "--out", "out", "--data"],
    "horizon": ["horizon", "miniature", "--out", "out", "--data"],
    "calibrate": ["calibrate", "miniature", "--keep", "0.2", "--method", "uniform", "--out", "out.json", "--data"],
    "tune": ["tune", "miniature", "--images", "images", "--out", "out", "--count", "30", "--data"],
}
"""Commands that ask a file of questions, which is known before a model is loaded."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of forty pictures, two of them cut in the middle, and a question about each."""
    good = miniature.write_images(tmp_path / "images", 38)
    Image.open(good[0]).convert("RGB").resize((300, 300)).save(tmp_path / "whole.jpg")
    for name, source in (("cut.jpg", tmp_path / "whole.jpg"), ("cut.png", good[0])):
        data = source.read_bytes()
        (tmp_path / "images" / name).write_bytes(data[: len(data) // 2])
    lines = [
        {"image": f"images/{path.name}", "question": "is there a red circle?", "answer": "yes"}
        for path in sorted((tmp_path / "images").iterdir())
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_they_are_all_named_before_a_model_is_loaded(refused, place, monkeypatch, command):
    monkeypatch.setattr("codebook.models.loading.load", pytest.fail)
    before = sorted(place.rglob("*"))
    words = ["2 pictures cannot be read, images/cut.jpg, images/cut.png: ", "truncated", "leave the questions about"]
    refused(*COMMANDS[command], "questions.jsonl", words=words)
    (place / "images" / "cut.jpg").write_bytes((place / "whole.jpg").read_bytes())
    refused(*COMMANDS[command], "questions.jsonl", words=["error: cannot read image images/cut.png: ", "truncated"])
    (place / "images" / "cut.png").write_bytes((place / "images" / "000000.png").read_bytes())
    with pytest.raises(pytest.fail.Exception):  # nothing more is in the way
        refused(*COMMANDS[command], "questions.jsonl", words=[])
    assert {path for path in place.rglob("*") if path.is_file()} - set(before) <= {place / "out" / "recipe.json"}


def test_a_picture_is_decoded_once_however_many_questions_ask_about_it(refused, place, monkeypatch):
    monkeypatch.setattr("codebook.models.loading.load", pytest.fail)
    lines = (place / "questions.jsonl").read_text() * 2
    (place / "questions.jsonl").write_text(lines)
    refused(*COMMANDS["bench"], "questions.jsonl", words=["2 pictures cannot be read"])


def test_questions_of_tunes_own_are_about_others(place, capfd):
    """Twenty of each half are wanted, and 38 pictures can be read."""
    found = image_questions("miniature", place / "images", 20, None, 0, strict=False)
    assert len(found) == 38 and all(one.images[0].size == (96, 96) for one in found)
    assert len(image_questions("miniature", place / "images", 19, None, 0, strict=False)) == 38
    with pytest.raises(CodebookError, match=r"cannot read image cut\.(jpg|png): .*truncated"):
        image_questions("miniature", place / "images", 20, None, 0, strict=True)
