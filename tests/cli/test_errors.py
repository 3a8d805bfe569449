"""Errors are one printable line of bounded length on stderr, with exit code 2; there is never a traceback."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from PIL import Image

import codebook.cli
from codebook import miniature
from codebook.cli.output import resumable
from codebook.errors import LONGEST_MESSAGE, CodebookError, counted, named_line, one_line, printable
from codebook.evaluation.datasets import load_tasks
from codebook.evaluation.parquet import Columns
from codebook.models.loading import check_dtype
from codebook.pruning.text import read_text
from codebook.serving.limits import read_limits
from codebook.store.fetching import pull
from codebook.store.known import find_named


def shell(script, **options):
    """Run a shell script in which `codebook` is the command line; stdout, stderr and the exit code."""
    run = f'codebook() {{ "{sys.executable}" -m codebook.cli "$@"; }}\n{script}'
    return subprocess.run(["bash", "-c", run], capture_output=True, text=True, **options)


def failing(monkeypatch, error):
    """Make `codebook list` raise."""

    def command():
        raise error

    app = typer.Typer()
    app.command("list")(command)
    app.command("other")(lambda: None)
    monkeypatch.setattr(codebook.cli, "app", app)


MISSPELT = {
    "seeded-middl": (read_text, "did you mean seeded-middle or seeded? `codebook list` names all"),
    "codebok@3:0.2": (
        read_text,
        "no method 'codebok': did you mean codebook or codebook-middle? `",
    ),
    "magic:0.2": (read_text, "no method 'magic': `codebook list` names all"),
    "fastv(quary='all')@3:5": (read_text, "fastv has no option 'quary': did you mean query? its options are "),
    "queu=3": (lambda name: read_limits([name]), "no limit 'queu': did you mean queue? give NAME=VALUE"),
    "miniatur": (find_named, "no codebook in miniatur: did you mean miniature? name another folder, or one that"),
    "llava-1.5-7": (pull, "no codebook 'llava-1.5-7': did you mean llava-1.5-7b? the registry has"),
    "easyvq:x": (
        lambda name: load_tasks([name]),
        "no data 'easyvq': did you mean easyvqa? give a JSONL file, or",
    ),
    "image=a&rul=b": (Columns.parse, "no key behind '?' is called 'rul': did you mean rule? use image, "),
    "floa16": (check_dtype, "no dtype 'floa16': did you mean float16 or bfloat16? use float32, bfloat16"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_name_is_answered_by_the_nearest_ones(name):
    look_up, words = MISSPELT[name]
    with pytest.raises(CodebookError) as caught:
        look_up(name)
    assert words in str(caught.value) and len(str(caught.value)) < 250


def test_one_is_no_plural(caplog):
    from codebook.cli.output import note_costs
    from codebook.pruning.engine.statistics import Statistics

    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    report = {"schedule": "s", "tokens": 9, "counts": [9, 4, 4], "keep": 0.6, "flops": 0.5, "kv_bytes": 0}
    with caplog.at_level("INFO", logger="codebook.cli"):
        note_costs(report, [])
    assert caplog.messages[0] == "schedule s: 9 of 9 visual tokens in layer 0, 4 in layers 1-2"
    assert str(Statistics(1, 1, 9, 4.0)).startswith("1 image, 4 of 9 visual tokens")


@pytest.mark.parametrize("text, shown", [
    ("plain", "plain"),
    ("two\nlines\t\r", "two\\nlines\\t\\r"),
    ("bytes \udcff", "bytes \\udcff"),
    ("\x1b[31mred\u2028\u202e", "\\x1b[31mred\\u2028\\u202e"),
    ("é 日本 🙂", "é 日本 🙂"),
])  # fmt: skip
def test_messages_are_one_printable_line(text, shown):
    assert printable(text) == str(CodebookError(text)) == shown
    assert printable(shown) == shown


def test_of_a_long_message_both_ends_are_shown():
    message = str(CodebookError(f"no such file: {'x' * 4000}; give another"))
    assert len(message) == LONGEST_MESSAGE and message.startswith("no such file: xxx") and " ... " in message
    assert message.endswith("x; give another") and str(CodebookError(message)) == message


def test_another_errors_words_are_cut_with_a_mark():
    for say, whole in ((one_line, "a b"), (named_line, "ValueError: a b")):
        assert say(ValueError("a \n b")) == say(ValueError("a b"), len(whole)) == whole
        assert say(ValueError("a b"), len(whole) - 1) == f"{whole[: len(whole) - 4]}..."
    assert one_line(ValueError()) == "ValueError"


BOOK = Path(__file__).parents[2] / "indexes" / "miniature"
NAMES = {
    "a line end": "a\nb.png",
    "control characters": "\x1b[2J\x07.png",
    "no UTF-8": b"\xff\xfe.png",
    "too long a name": "x" * 300,
    "too long a path": "x/" * 2040,
    "other alphabets": "日本\u202e.png",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_odd_file_names(run, name):
    code, out, err = run("prune", "miniature", "--image", os.fsdecode(name), "--ask", "?")
    [line] = err.splitlines()
    assert code == 2 and not out and line.startswith("error: ") and line.isprintable()
    assert len(line) <= LONGEST_MESSAGE + len("error: ")


def test_odd_names_where_only_ascii_can_be_shown():
    done = shell("codebook $'\\xff\\n\u00e9'", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert "\\udcff\\n\\xe9" in done.stderr


@pytest.mark.parametrize("options, words", [
    (["--nonsense"], ["No such option", "--nonsense", "see `codebook prune --help`"]),
    (["--keep", "much"], ["--keep", "see `codebook prune --help`"]),
    (["--batch", "0"], ["--batch", "1"]),
    (["--seed", "-1"], ["--seed", "0"]),
    (["--seed", str(2**32)], ["--seed", str(2**32 - 1)]),
    (["--keep"], ["--keep"]),
])  # fmt: skip
def test_impossible_options_are_one_line(run, options, words):
    code, out, err = run("prune", "miniature", *options)
    [line] = err.splitlines()
    assert code == 2 and not out and line.startswith("error: ") and all(word in line for word in words), err


def test_an_unknown_command_and_none(run):
    code, _, err = run("prun")
    assert code == 2 and "prune" in err and len(err.splitlines()) == 1
    for argv in ([], ["miniature"]):
        code, out, err = run(*argv)
        assert code == 2 and "Usage: codebook" in out + err and "Traceback" not in err


@pytest.mark.parametrize("number, words", [
    (errno.ENOSPC, ["free space"]),
    (errno.EDQUOT, ["free space"]),
    (errno.EROFS, ["nothing can be written there", "another folder"]),
    (errno.EACCES, ["another path", "permissions"]),
    (errno.EPERM, ["another path", "permissions"]),
    (errno.ENOLCK, ["no file locks", "another one"]),
    (errno.ENOTSUP, ["no file locks", "another one"]),
    (errno.ENAMETOOLONG, ["shorter name"]),
    (errno.EMFILE, ["ulimit"]),
    (errno.EIO, ["check the disk"]),
    (errno.ENETDOWN, ["another folder"]),
])  # fmt: skip
def test_errors_of_the_system_name_their_remedy(refused, monkeypatch, number, words):
    failing(monkeypatch, OSError(number, os.strerror(number), "out/file"))
    refused("list", words=["out/file", os.strerror(number), *words])
    if number not in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(AssertionError):
            refused("list", words=["free space"])


def test_an_unexpected_error_says_where_it_was(run, monkeypatch):
    failing(monkeypatch, KeyError("secret\nword"))
    code, out, err = run("list")
    [line] = err.splitlines()
    assert code == 1 and not out
    assert line.startswith("error: unexpected KeyError: 'secret\\nword' (cli/__init__.py, line ")
    assert "codebook doctor" in line and "-X dev" in line


class OutOfMemoryError(RuntimeError):
    """As torch's."""


@pytest.mark.parametrize("error", [
    MemoryError(), OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
])  # fmt: skip
def test_out_of_memory_names_the_remedy(refused, monkeypatch, error):
    failing(monkeypatch, error)
    refused("list", words=["out of memory", "smaller --batch"])


def test_an_interrupted_command_is_one_line_and_130(run, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    assert run("list") == (130, "", "interrupted\n")


@pytest.mark.parametrize("given, words", [({}, "interrupted\n"), ({"out": "x"}, "the same command goes on\n")])
def test_a_command_that_keeps_its_work_says_so_when_interrupted(run, monkeypatch, given, words):
    @resumable("out")
    def command(out: str | None = None) -> None:
        raise KeyboardInterrupt

    app = typer.Typer()
    app.command("list")(command)
    app.command("other")(lambda: None)
    monkeypatch.setattr(codebook.cli, "app", app)
    code, out, err = run("list", *(f"--{name}={value}" for name, value in given.items()))
    assert code == 130 and not out and err.endswith(words) and len(err.splitlines()) == 1


@pytest.mark.parametrize("module, press", [("codebook.cli.tune", "press()"),
                                           ("codebook.store.known", "type('', (), {'__del__': press})()")])  # fmt: skip
def test_control_c_during_imports(module, press):
    """While the command line is imported, and in a callback, whose errors Python only prints."""
    script = (
        "import runpy, sys\n"
        "def press(*_):\n"
        "    raise KeyboardInterrupt\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        f"        {press} if name == {module!r} else None\n"
        "sys.meta_path.insert(0, Finder)\n"
        "sys.argv = ['codebook', 'list']\n"
        "runpy.run_module('codebook', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=BOOK.parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


RESUMABLE = {
    "build": ["build", "miniature", "--images", "images", "--out", "new"],
    "extend": ["extend", BOOK, "--images", "images", "--out", "new"],
    "merge": ["merge", BOOK, BOOK, "--out", "new"],
    "prune --input": ["prune", "miniature", "--input", "in.jsonl", "--output", "new"],
    "horizon --out": ["horizon", "miniature", "--data", "miniature", "--count", "1", "--out", "new"],
    "calibrate": ["calibrate", "miniature", "--data", "miniature", "--keep", ".2", "--count", "8", "--out", "a.json"],
    "bench": ["bench", "miniature", "--methods", "uniform", "--count", "1", "--out", "new"],
    "demo": ["demo", "--out", "new"],
    "train": ["miniature", "train", "--out", "new"],
    "evaluate --check": ["miniature", "evaluate", "--check", "new"],
}
OTHERS = {
    "prune": ["prune", "miniature", "--image", "images/000000.png", "--ask", "?"],
    "horizon": ["horizon", "miniature", "--data", "miniature", "--count", "1"],
    "evaluate": ["miniature", "evaluate"],
}


@pytest.mark.parametrize("command", (RESUMABLE | OTHERS).keys())
def test_which_commands_go_on(run, tmp_path, monkeypatch, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    miniature.write_images(tmp_path / "images", 1)
    (tmp_path / "in.jsonl").write_text('{"image": "images/000000.png", "question": "?"}')
    for name in (
        "codebook.models.load",
        "codebook.models.loading.load",
        "codebook.building.merge",
        "codebook.miniature.train.train",
    ):
        monkeypatch.setattr(name, interrupted)
    code, out, err = run(*(RESUMABLE | OTHERS)[command])
    said = "interrupted: what is finished is kept, and the same command goes on\n"
    assert (code, out, err) == (130, "", said if command in RESUMABLE else "interrupted\n")


def test_control_c_in_a_build(tmp_path):
    """A real signal to a real process; the same command then ends well."""
    miniature.write_images(tmp_path / "images", 8)
    argv = [sys.executable, "-m", "codebook.cli", "build", "miniature", "--images", tmp_path / "images", "--out",
            tmp_path / "book", "--tau-p", "1", "--tau-j", "99"]  # fmt: skip
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(file.is_file() and file.stat().st_size for file in (tmp_path / "book").rglob("*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and not out, err
    assert err.splitlines()[-1] == "interrupted: what is finished is kept, and the same command goes on"
    assert "Traceback" not in err and subprocess.run(argv, capture_output=True).returncode == 0


def test_a_reader_that_leaves():
    for command in ("list", "--help"):
        done = shell(f"set -o pipefail; codebook {command} | true")
        assert done.returncode in (0, 141) and not done.stderr


def test_closed_and_full_streams():
    closed = "error: standard output is closed: send it to a file, or to /dev/null\n"
    done = shell("codebook list >&-")  # before anything is done
    assert done.returncode == 2 and done.stderr == closed
    done = shell("codebook --help <&- 2>&-")
    assert done.returncode == 0 and "prune" in done.stdout
    done = shell("codebook nonsense 2>&-")
    assert done.returncode == 2 and not done.stdout
    if os.path.exists("/dev/full"):
        for command in ("--help", "list"):
            done = shell(f"codebook {command} >/dev/full")
            assert done.returncode == 2 and "output" in done.stderr and "free space" in done.stderr
            assert len(done.stderr.splitlines()) == 1


def test_an_answer_that_the_terminal_cannot_show(tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "ü.png")
    done = shell(f"codebook show miniature --image {tmp_path}/ü.png --ask describe. --methods uniform --out "
                 f"{tmp_path}/ö.png", env=os.environ | {"PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert done.returncode == 0 and "\\xf6.png" in done.stderr and "#" in done.stdout
