"""Follows README and docs to the letter: `make test-docs`, or `python -m tests.follow_docs README.md docs/pruning.md`.

README is followed first, in an empty folder. Every other page goes on in a copy of what it left, with its Python names.
A block of commands is run line by line; the block behind it, if it is no commands, is what the page says they print. A
Python block is run as one, and what a comment says behind `print(...)` or an expression must be so. What cannot be run
here says why in the page, invisibly, in the line before its block:

    <!-- not run: REASON -->        the block is left out, and listed
    <!-- varies: 4.4 | 0.7 s -->    these pieces of what is printed, times and paths, may be others
    <!-- first: PYTHON -->          what a page leaves to its reader, such as a list of questions

Lines with a placeholder (MODEL, FILE, OWNER/NAME, photos, ...), and those that set a machine up (make, pip), are not
run; they are listed too. The reader's own file, `tokens.safetensors`, is there from the start.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(
    r"^(?:<!-- (not run|varies|first): ([^>]*?) -->\n)?^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL
)
PROGRAMS = ("codebook", "python", "make", "pip", "echo", "curl", "for", "docker", "git", "set", "{", ".")
SETUP = ("make ", "pip ", ". .venv/")
PLACEHOLDER = re.compile(r"\b(?:MODEL|FILE|OWNER/NAME|NAME|TEXT)\b|\bphotos?\b|\.\.\.|/path/|someone/")
SHELL = re.compile(r"[|;&<>$`*]")


@dataclass(frozen=True)
class Block:
    line: int
    mark: str
    said: str
    language: str
    body: str

    @property
    def commands(self) -> bool:
        words = self.body.split()
        return self.language in ("", "bash") and bool(words) and words[0] in PROGRAMS


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(text[: m.start(4)].count("\n") + 1, m[1] or "", m[2] or "", m[4], textwrap.dedent(m[5]))
        for m in BLOCK.finditer(text)
    ]


def in_process(argv: list[str]) -> tuple[int, str]:
    """Run the command line; its exit code, and what it printed: results and notes in the order of a terminal."""
    from codebook import cli

    printed, code = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            cli.main(argv)
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, printed.getvalue()


def in_shell(line: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def run_line(line: str) -> str:
    """Run one command; what it printed."""
    simple = line.startswith("codebook ") and not SHELL.search(re.sub(r"'[^']*'|\"[^\"]*\"", "", line))
    code, printed = in_process(shlex.split(line, comments=True)[1:]) if simple else in_shell(line)
    if code:
        raise AssertionError(f"`{line}` ended with {code}: {printed.strip()[-400:]}")
    return printed


def check_printed(block: Block, printed: str) -> None:
    """Every line that the page shows was printed, in this order, but for what varies."""
    lines, varies = iter(printed.splitlines()), block.said.split(" | ") if block.mark == "varies" else []
    for shown in filter(str.strip, block.body.splitlines()):
        pattern = re.escape(shown.rstrip())
        for piece in varies:
            pattern = pattern.replace(re.escape(piece), r"\S+?" + r" \S+?" * piece.count(" "))
        if not any(re.fullmatch(pattern, line.rstrip()) for line in lines):
            raise AssertionError(f"the page shows {shown!r}, which was not printed (in this order): {printed[-600:]!r}")


def run_python(source: str, names: dict[str, Any]) -> None:
    """Run a block, statement by statement, and compare what comments say of printed text and of values."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        end = (node.end_lineno or 0) - 1
        comment = lines[end].encode()[node.end_col_offset :].decode().strip().removeprefix("#").strip()
        code, printed, value = ast.Module([node], []), io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            if isinstance(node, ast.Expr):
                value = eval(compile(ast.Expression(node.value), "<page>", "eval"), names)
            else:
                exec(compile(code, "<page>", "exec"), names)
        said = printed.getvalue().strip()
        if comment and said and said != comment:
            raise AssertionError(f"{lines[end].strip()!r} printed {said!r}")
        if comment and isinstance(value, str) and not comment.startswith(value):
            raise AssertionError(f"{lines[end].strip()!r} is {value!r}")
        if comment and isinstance(value, int | float | list):
            try:
                expected = eval(comment.partition(": ")[0], {})
            except (SyntaxError, NameError):
                continue  # prose
            if expected != value:
                raise AssertionError(f"{lines[end].strip()!r} is {value!r}")


def follow(page: str, names: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What a page got wrong, and what of it was left out."""
    wrong, left_out, printed = [], [], None
    for block in blocks(ROOT / page):
        where, start = f"{page}:{block.line}", time.monotonic()
        if block.mark == "not run":
            left_out.append(f"{where}: {block.said}")
            printed = None
            continue
        try:
            if block.mark == "first":
                exec(block.said, names)
            if block.language == "python":
                run_python(block.body, names)
                printed = None
            elif block.commands:
                printed = None
                for line in block.body.replace("\\\n", " ").splitlines():
                    if not line.strip() or line.startswith("#"):
                        continue
                    if line.startswith(SETUP) or PLACEHOLDER.search(line.partition(" #")[0]):
                        left_out.append(f"{where}: {line.strip()}")
                    else:
                        printed = (printed or "") + run_line(line)
            elif printed is not None:
                check_printed(block, printed)
            else:
                left_out.append(f"{where}: {block.body.splitlines()[0]}")
        except Exception as error:
            wrong.append(f"{where}: {type(error).__name__}: {error}")
            printed = None
            print(f"wrong: {wrong[-1]}", file=sys.stderr, flush=True)  # now, and once more in the end
        print(f"{where}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return wrong, left_out


def shims(folder: Path) -> None:
    """`codebook` and `python` for the shell: those of this checkout."""
    folder.mkdir()
    for name, words in (("python", ""), ("codebook", "-m codebook.cli")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (folder / name).chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = str(ROOT)


def main(pages: list[str]) -> int:
    wrong, left_out = [], []
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        shims(top / "bin")
        (top / "README").mkdir()
        os.chdir(top / "README")
        save_file({"mine": torch.randn(144, 160)}, "tokens.safetensors")
        names: dict[str, Any] = {}
        found = follow("README.md", names)  # also where only other pages are asked for: they go on from it
        wrong, left_out = wrong + found[0], left_out + found[1]
        for page in pages:
            if page != "README.md":
                os.chdir(shutil.copytree(top / "README", top / Path(page).stem))
                found = follow(page, dict(names))
                wrong, left_out = wrong + found[0], left_out + found[1]
        os.chdir(ROOT)
    print("left out:", *left_out, sep="\n  ")
    print(*(["wrong:", *wrong] if wrong else [f"{len(pages)} pages say what is so"]), sep="\n  ")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or PAGES))
