"""Samples from files and from the miniature, and the tokens of their answers."""

import json
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
from PIL import Image

from codebook import miniature, models
from codebook.errors import CodebookError
from codebook.inference import samples as data
from codebook.inference.prompts import answer_ids
from codebook.inference.respond import respond
from codebook.inference.samples import Sample
from codebook.miniature.samples import of_miniature


@pytest.fixture
def picture(tmp_path):
    return miniature.write_images(tmp_path / "images", 1)[0]


def write(tmp_path, *records):
    file = tmp_path / "data.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return file


def test_a_file_of_samples(tmp_path, picture):
    name = str(picture.relative_to(tmp_path))
    file = write(
        tmp_path,
        {"image": name, "question": "q", "answer": "a b", "task": " t ", "more": 1},
        "",
        {"images": [name, name], "question": "r"},
    )
    one, two = data.read_samples(file)
    assert (one.answer, one.task, len(one.pictures())) == ("a b", "t", 1)
    assert (two.answer, two.task, len(two.pictures())) == (None, "all", 2)
    assert [one.score(text) for text in ("A  b", "a", "b a")] == [1, 0, 0]


WRONG = [
    '{"image": 1, "question": "q"}',
    '{"question": "q"}',
    '{"image": "x", "question": "q", "answer": 3}',
    "[]",
    "{",
]


def test_a_task_that_breaks_tables_is_refused(tmp_path):
    file = write(tmp_path, {"image": "a.png", "question": "q", "task": "a\nb"})
    with pytest.raises(CodebookError, match=r"line 1: the task 'a\\nb' has characters that cannot be shown: rename it"):
        data.read_samples(file)


@pytest.mark.parametrize("record", WRONG)
def test_a_wrong_line_is_named(tmp_path, record):
    with pytest.raises(CodebookError, match="line 1: write lines of"):
        data.read_samples(write(tmp_path, record))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CodebookError, match=r"missing: .*nowhere\.png"):
        data.read_samples(write(tmp_path, {"image": "nowhere.png", "question": "q"}))
    with pytest.raises(CodebookError, match="cannot read"):
        data.read_samples(tmp_path / "nothing.jsonl")
    with pytest.raises(CodebookError, match="no samples"):
        data.read_samples(write(tmp_path, ""))


def test_every_stretch_of_mixed_samples_has_all_tasks():
    samples = [Sample((), str(i), "a", task) for task, n in (("a", 8), ("b", 4)) for i in range(n)]
    order = data.mixed(samples, seed=3)
    assert sorted(order, key=repr) == sorted(samples, key=repr)
    assert [sum(s.task == "a" for s in order[i : i + 3]) for i in range(0, 12, 3)] == [2, 2, 2, 2]
    assert order == data.mixed(samples, seed=3) != data.mixed(samples, seed=4)
    assert data.samples_digest(order) != data.samples_digest(samples)


def test_samples_are_known_by_their_pictures_contents(tmp_path, picture):
    """Other pixels under the same name and of the same size are another picture; another name is none."""
    asked = Sample((picture,), "q", "a", "t")
    before = data.samples_digest([asked])
    image = asked.pictures()[0]
    copied = tmp_path / "copy.png"
    copied.write_bytes(picture.read_bytes())
    assert data.samples_digest([replace(asked, images=(copied,))]) == before
    image.putpixel((0, 0), (1, 2, 3))
    image.save(picture)
    assert data.samples_digest([asked]) != before
    # Open pictures too, and their shape: the same bytes in another one are another picture.
    flat, tall = (Sample((Image.frombytes("L", size, bytes(8)),), "q") for size in ((4, 2), (2, 4)))
    assert data.samples_digest([flat]) != data.samples_digest([tall])
    assert data.samples_digest([replace(asked, answers=("a", "b"))]) != data.samples_digest([asked])
    with pytest.raises(CodebookError, match=r"cannot read .*none"):
        data.samples_digest([Sample((tmp_path / "none.png",), "q")])


def test_an_edited_picture_is_asked_again(tmp_path, picture):
    loaded = models.load("miniature", "cpu")
    file, asked = tmp_path / "answers.sqlite", [Sample((picture,), "is there a red circle?")]

    def count():
        with closing(sqlite3.connect(file)) as database:
            return database.execute("SELECT count(*) FROM records WHERE key != 'null'").fetchone()[0]

    respond(*loaded, asked, {"": lambda group: None}, file)
    respond(*loaded, asked, {"": lambda group: None}, file)
    assert count() == 1
    Image.new("RGB", asked[0].pictures()[0].size).save(picture)
    respond(*loaded, asked, {"": lambda group: None}, file)
    assert count() == 2


def test_samples_of_the_miniature_are_scored_its_way():
    samples = of_miniature("train", 0, 1)
    assert [s.task for s in samples] == list(miniature.TASK_FAMILIES)
    box = next(s for s in samples if s.task == "box")
    assert box.score(box.answer) == 1 and box.score("p0") == 0


def test_answers_are_tokens_behind_the_prompt(processor):
    ids = answer_ids(processor, Sample((None,), "read the number.", " 4 7 ", "ocr"))
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["4", "7"]
    same = Sample((None,), "is there a yes?", "yes")  # the answer's word stands in the question too
    assert processor.tokenizer.convert_ids_to_tokens(answer_ids(processor, same)) == ["yes"]
    with pytest.raises(CodebookError, match="has no tokens"):
        answer_ids(processor, Sample((None,), "describe.", " "))
