"""`codebook prune --input`: a bad line does not end the job, and a run that was stopped goes on to the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from codebook import miniature
from codebook.inference import ask as asking
from codebook.store.files import TEMPORARY
from tests.journals import count_records

KEEP = ["--keep", "0.3", "--method", "random", "--seed", "3"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return miniature.write_images(tmp_path_factory.mktemp("scenes"), 6)


@pytest.fixture
def job(tmp_path, scenes):
    """Write lines into a file of questions; returns the command that answers it, and its output."""

    def write(lines, name="in.jsonl"):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / name).write_text(text)
        output = tmp_path / "out.jsonl"
        return ["prune", "miniature", "--input", tmp_path / name, "--output", output, *KEEP], output

    return write


def records(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


def good(scenes, count=None):
    return [{"id": i, "image": str(image), "question": "describe."} for i, image in enumerate(scenes[:count])]


NAMES = ["in.jsonl", "out.jsonl", "plain-out.jsonl", "plain.jsonl", "pointer.png"]
BAD = {
    "an image token": {"question": "<image>\ndescribe."},
    "a token in the middle": {"question": "what is <image> here?"},
    "another special token": {"question": "describe.</s> and go on"},
    "a missing picture": {"image": "nowhere.png"},
    "a folder for a picture": {"image": "."},
    "a name with a null byte": {"image": "a\0.png"},
    "a text for a picture": {"image": "in.jsonl"},
    "too long a question": {"question": "describe " * 20_000},
    "one of two pictures missing": {"images": ["nowhere.png"]},
    "a pointer of Git LFS for a picture": {"image": "pointer.png"},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_line_gets_an_error_and_the_others_their_answers(run, job, scenes, bad):
    lines = good(scenes, 3)
    if "images" in bad:
        del lines[2]["image"]
    argv, output = job([*lines[:2], lines[2] | bad])
    output.with_name("pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    plain_argv, plain = job(lines[:2], "plain.jsonl")
    plain_argv[plain_argv.index("--output") + 1] = plain.with_name("plain-out.jsonl")
    code, out, err = run(*argv, "--json")
    assert code == 0 and json.loads(out)["failed"] == 1 and "skipped: line 3: " in err, err
    found = records(output)
    assert found[2]["error"] and "answer" not in found[2] and len(found[2]["error"].splitlines()) == 1
    assert run(*plain_argv)[0] == 0
    assert found[:2] == records(plain.with_name("plain-out.jsonl"))
    assert sorted(os.listdir(output.parent)) == NAMES


@pytest.mark.parametrize("line", [
    "{", "3", "null", "[]", '"text"', '{"image": "a.png"}', '{"question": "?"}', '{"image": 3, "question": "?"}',
    '{"image": "a.png", "question": ["?"]}', '{"images": [], "question": "?"}', '{"images": "a.png", "question": "?"}',
    '{"images": {"a.png": 1}, "question": "?"}', '{"image": "a.png", "question": "\\ud800"}', "[" * 10_000,
])  # fmt: skip
def test_a_malformed_line_is_refused_before_the_model_is_loaded(refused, job, scenes, line, monkeypatch):
    monkeypatch.setattr("codebook.models.load", None)
    argv, output = job([good(scenes)[0], "", line])
    refused(*argv, words=["in.jsonl, line 3", "question"])
    assert not output.exists()


@pytest.mark.parametrize("also", [{"images": ["b.png"]}, {"video": "b.mp4"}])
def test_pictures_given_in_two_ways(refused, job, scenes, also, monkeypatch):
    monkeypatch.setattr("codebook.models.load", None)
    argv, output = job([good(scenes)[0] | also])
    refused(*argv, words=["in.jsonl, line 1", "more than one; leave one"])
    assert not output.exists()


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_no_questions(refused, job, lines, monkeypatch):
    monkeypatch.setattr("codebook.models.load", None)
    argv, output = job(lines)
    refused(*argv, words=["in.jsonl holds no questions"])
    assert not output.exists()


def test_no_question_has_its_images(refused, job, monkeypatch):
    monkeypatch.setattr("codebook.models.load", None)
    argv, output = job([{"image": f"{i}.png", "question": "?"} for i in range(3)])
    refused(*argv, words=["no question", "0.png", "relative to the file"])
    assert not output.exists()


def test_no_question_can_be_answered(run, job, scenes):
    argv, output = job([line | {"question": "<image>"} for line in good(scenes, 2)])
    code, out, err = run(*argv)
    assert code == 2 and err.splitlines()[-1].startswith("error: no question") and "'<image>'" in err
    assert "0 answers" in out and [record["id"] for record in records(output)] == [0, 1]


def test_strict_stops_at_a_bad_line(refused, job, scenes):
    argv, output = job([*good(scenes, 2), good(scenes)[2] | {"question": "<image>"}])
    refused(*argv, "--strict", words=["line 3", "<image>"])
    assert not output.exists()


def test_a_picture_that_only_the_model_refuses(run, job, scenes, monkeypatch):
    """An error of the processor's own, for one picture of a batch."""
    real = asking.prepare

    def prepare(model, processor, images, questions):
        if any(picture.size == (7, 7) for own in images for picture in own):
            raise ValueError("absurd aspect ratio\nof the picture")
        return real(model, processor, images, questions)

    monkeypatch.setattr(asking, "prepare", prepare)
    argv, output = job([*good(scenes, 2), {"image": "odd.png", "question": "describe."}])
    Image.new("RGB", (7, 7)).save(output.with_name("odd.png"))
    assert run(*argv)[0] == 0
    found = records(output)
    assert found[2]["error"] == "ValueError: absurd aspect ratio\\nof the picture"
    assert all(record["answer"] and record["kept"] == [43] for record in found[:2])


def test_what_ails_the_model_ends_the_job(refused, job, scenes, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("codebook.cli.prune_file.ask", broken)
    argv, output = job(good(scenes, 2))
    code_and_more = pytest.raises(AssertionError)
    with code_and_more:  # not a user's error, so not exit code 2
        refused(*argv, words=["mat1"])
    assert not output.exists()


def test_an_output_as_input_forgets_what_went_wrong(run, job, scenes):
    argv, output = job([good(scenes)[0] | {"error": "no such image", "answer": "x", "kept": [1]}])
    assert run(*argv)[0] == 0
    [record] = records(output)
    assert "error" not in record and record["answer"] != "x" and record["kept"] == [43]


def test_an_output_says_which_pictures_it_is_about(run, job, scenes):
    """As the lines said it, so that it can be the next run's input."""
    argv, output = job([{"images": [str(scene) for scene in scenes[:2]], "question": "describe."}, *good(scenes, 1)])
    assert run(*argv)[0] == 0
    first = output.read_bytes()
    assert [record.get("images") for record in records(output)] == [[str(scene) for scene in scenes[:2]], None]
    argv, output = job(records(output))
    assert run(*argv)[0] == 0 and output.read_bytes() == first


def killed(argv, output, by):
    """Run the command and stop it as soon as its journal holds a batch; what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "codebook.cli", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    journal, deadline = output.with_name(output.name + ".sqlite"), time.monotonic() + 240
    while not count_records(journal):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(by)
    _, err = process.communicate(timeout=240)
    return process.returncode, err


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(run, job, scenes, by, monkeypatch):
    lines = [line | {"question": f"describe.{'.' * n}"} for n in range(6) for line in good(scenes)]
    argv, output = job([*lines, {"image": "gone.png", "question": "?"}])
    argv += ["--batch", 3]
    whole = [*argv[: argv.index("--output") + 1], output.with_name("whole.jsonl"), *argv[argv.index("--output") + 2 :]]
    assert run(*whole)[0] == 0
    code, err = killed(argv, output, by)
    if by == signal.SIGINT:
        assert code == 130 and err.splitlines()[-1].endswith("the same command goes on") and "Traceback" not in err
    journal = output.with_name("out.jsonl.sqlite")
    assert not output.exists() and journal.exists()
    before = count_records(journal)
    (output.parent / f"{TEMPORARY}0123456789abcdef.tmp").write_bytes(b"half")  # of a kill during the last step
    asked = []
    real = asking.ask
    monkeypatch.setattr("codebook.cli.prune_file.ask", lambda *given: asked.append(1) or real(*given))
    assert run(*argv)[0] == 0
    assert output.read_bytes() == output.with_name("whole.jsonl").read_bytes()
    assert before >= 1 and len(asked) <= 13 - before
    assert sorted(os.listdir(output.parent)) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_other_pictures_or_settings_are_not_taken_from_the_journal(run, refused, job, scenes, monkeypatch):
    argv, output = job(good(scenes, 4))
    picture = output.with_name("mine.png")
    picture.write_bytes(scenes[0].read_bytes())
    argv, output = job([{"image": "mine.png", "question": "describe."}, good(scenes)[1]])
    argv += ["--batch", 1]
    real, asked = asking.ask, []

    def stop_at_second(*given):
        if asked:
            raise KeyboardInterrupt
        asked.append(1)
        return real(*given)

    monkeypatch.setattr("codebook.cli.prune_file.ask", stop_at_second)
    assert run(*argv)[0] == 130
    refused(*argv, "--max-new-tokens", 8, words=["out.jsonl.sqlite", "another max_new_tokens", "--output"])
    picture.write_bytes(scenes[2].read_bytes())  # the same name, another picture
    monkeypatch.setattr("codebook.cli.prune_file.ask", real)
    assert run(*argv)[0] == 0
    alone = run("prune", "miniature", "--image", scenes[2], "--ask", "describe.", *KEEP)[1].strip()
    assert records(output)[0]["answer"] == alone
