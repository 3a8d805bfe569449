"""What README and docs name exists: links, paths, modules, commands with their options, names in Python examples."""

import ast
import itertools
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import pytest
from typer.main import get_command

from codebook.cli import app

ROOT = Path(__file__).parent.parent
WRITTEN = {"docs/results.md"}  # by `make results`
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md"))
    if page.relative_to(ROOT).as_posix() not in WRITTEN
)
pytestmark = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"\b(?:codebook|tests|benchmarks|docs|indexes)/[\w./-]*\w")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def fences(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text()) if kind == language]


def spans(page: Path) -> list[str]:
    """Inline code, each on one line."""
    return [" ".join(span.split()) for span in SPAN.findall(prose(page))]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the page's headings."""
    heads = re.findall(r"(?m)^#+ (.*)$", prose(page))
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_paths(page):
    """Files of the repository that a page names. What a guide has its reader create stands in fenced code."""
    for path in PATH.findall(" ".join(spans(page))):
        assert (ROOT / path).exists(), path


def test_modules_and_names(page):
    for span in spans(page) if page.name != "CHANGELOG.md" else []:  # which also says what things were called
        match = re.fullmatch(r"(codebook(?:\.\w+)+)(?:\(.*\))?", span)
        if match and not match[1].endswith((".py", ".json")):
            resolve_name(match[1])
    for module in re.findall(r"python -m ([\w.]+)", page.read_text()):
        assert find_spec(module), module


def test_make_targets(page):
    targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
    named = [span.split()[1] for span in spans(page) if re.match(r"make [\w-]+$", span)]
    named += re.findall(r"(?m)^make ([\w-]+)", "".join(fences(page, "")))
    assert set(named) <= targets


def commands(code: str) -> list[list[str]]:
    """The words of each `codebook ...` command in shell code; a command may stand behind `do` or assignments."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.commenters, lexer.whitespace_split = "#", True
        words = list(lexer)
        ends = [i for i, word in enumerate(words) if set(word) <= set(";&|")]
        for start, end in zip([0, *(i + 1 for i in ends)], [*ends, len(words)], strict=True):
            rest = [*itertools.dropwhile(lambda word: word == "do" or re.match(r"\w+=", word), words[start:end])]
            if rest[:1] == ["codebook"]:
                found.append(rest[1:])
    return found


def options(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def command(words: list[str]):
    """The command that the words begin with, and the words behind its name."""
    group, words = get_command(app), list(words)
    while hasattr(group, "commands"):
        assert words and words[0] in group.commands, words
        group = group.commands[words.pop(0)]
    return group, words


def known(group) -> set[str]:
    return {"--help", *(name for one in group.params for name in (*one.opts, *one.secondary_opts))}


def test_shown_commands_parse(page):
    """As the command line itself parses them; where some of it is left out (...), what is there must be known."""
    for code in fences(page, ""):
        for words in commands(code):
            group, rest = command(words)
            assert options(rest) <= known(group), words
            if not any("..." in word for word in rest):
                group.make_context(group.name, rest)  # raises what it would tell its user


def test_named_commands_exist(page):
    for span in spans(page):
        if re.match(r"codebook [a-z]", span):
            group, rest = command(shlex.split(span)[1:])
            assert options(rest) <= known(group), span


def test_python_examples(page):
    """They are Python, and what they import from the package is there."""
    for code in fences(page, "python"):
        lines = code.splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        for node in ast.walk(ast.parse("\n".join(line[indent:] for line in lines))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("codebook"):
                for name in node.names:
                    assert hasattr(resolve_name(node.module), name.name), name.name


def test_plain_words(page):
    """House rule: whole sentences, "per" for rates, and none of the odd words."""
    odd = re.compile(
        r"(?m)^(?:- |\d+\. )?Of [a-z]|\b(?:[Hh]ears|[Dd]ear(?:est)?|[Mm]end(?:ed)?|the rather|each for itself)\b"
        r"|\b(?:forward|batch|image|family|cluster|core|row)s? an? (?:image|batch|forward|family|cluster|core|row)\b"
    )
    text = re.sub(r"(?m)^\|.*$", "", prose(page))  # tables are measured results and stay as they are
    assert not odd.findall(text)
