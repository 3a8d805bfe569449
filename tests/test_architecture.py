"""The map in docs/architecture.md is true: who imports whom; and names, docstrings and tests keep the house's rules.

Imports inside functions count, imports under `if TYPE_CHECKING` do not: they serve annotations only.
"""

import ast
import functools
import re
from collections import defaultdict
from itertools import chain
from pathlib import Path

import grimp
import pytest

import codebook

ROOT = Path(__file__).parent.parent
# Every module may define these; any other top-level name lives in one module. `router` makes a part of the service.
REPEATED = {"__all__", "__getattr__", "__dir__", "router"}


def rooms(markdown: str) -> dict[str, set[str]]:
    """Each room of the table and what it may import, as module names below the package."""
    cells = [line.split("|")[1:-1] for line in markdown.splitlines() if line.startswith("| `")]
    code = re.compile(r"`([^`]+)`")
    table = {}
    for room, _, others in cells:
        (name,) = code.findall(room)
        table[name.replace("/", ".")] = {other.replace("/", ".") for other in code.findall(others)}
    return table


def room_of(module: str, table: dict[str, set[str]]) -> str:
    """The innermost room that the module lies in; "" for the package itself."""
    path = module.partition(".")[2].split(".")
    inside = [".".join(path[:n]) for n in range(len(path), 0, -1)]
    return next((name for name in inside if name in table), inside[-1])


def package(name: str):
    return grimp.build_graph(name, exclude_type_checking_imports=True, cache_dir=None)


def breaches(graph, table: dict[str, set[str]]) -> list[str]:
    """Imports from a room that the table does not allow, and modules that lie in no room."""
    found = []
    for module in sorted(graph.modules):
        here = room_of(module, table)
        if not here:
            continue  # the package itself names what is public, wherever it lives
        if here not in table:
            found.append(f"{module} lies in no room")
            continue
        for other in sorted(graph.find_modules_directly_imported_by(module)):
            there = room_of(other, table)
            if there not in table[here] | {here} and not (there == "" and only_version(graph, module, other)):
                found.append(f"{module} imports {other}")
    return found


def only_version(graph, module: str, whole: str) -> bool:
    """Whether all that the module takes from the package itself, beside its modules, is its version."""
    lines = [d["line_contents"] for d in graph.get_import_details(importer=module, imported=whole)]
    names = [set(line.partition(" import ")[2].split(", ")) for line in lines]
    return all(line - {name.rpartition(".")[2] for name in graph.modules} == {"__version__"} for line in names)


def circles(graph) -> list[str]:
    """Imports that a chain of imports leads back from."""
    arrows = [(a, b) for a in sorted(graph.modules) for b in sorted(graph.find_modules_directly_imported_by(a))]
    chains = [(a, graph.find_shortest_chain(b, a)) for a, b in arrows]
    return [" -> ".join((a, *back)) for a, back in chains if back]


@pytest.fixture(scope="module")
def table():
    return rooms((ROOT / "docs/architecture.md").read_text())


@pytest.fixture(scope="module")
def graph():
    return package("codebook")


def test_no_room_reaches_up(graph, table):
    assert not breaches(graph, table)


def test_the_map_names_the_rooms_that_are_there(graph, table):
    assert {f"codebook.{name}" for name in table} <= graph.modules
    assert set(chain(*table.values())) <= set(table)


def test_what_the_table_itself_must_say(table):
    """The rule of the design, however the table is edited."""
    order = [
        "models",
        "store",
        ("pruning", "building"),
        "inference",
        ("analysis", "evaluation"),
        ("integrations", "serving"),
        "cli",
        "__main__",
    ]
    floors = {name: i for i, names in enumerate(order) for name in ([names] if isinstance(names, str) else names)}
    for name, others in table.items():
        top = name.partition(".")[0]
        for other in {other.partition(".")[0] for other in others} - {"errors", top}:
            if other == "miniature":
                assert top == "cli"
            elif top != "miniature":
                assert floors[other] < floors[top], f"{name} may import {other}"
    assert not table["errors"]


def test_no_circles(graph):
    assert not circles(graph)


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A package made of {module: source}; returns its graph."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(sources):
        for module, source in sources.items():
            file = tmp_path / "madeup" / f"{module.replace('.', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        for folder in {p.parent for p in tmp_path.rglob("*.py")}:
            (folder / "__init__.py").touch()
        return package("madeup")

    return make


MAP = """
| room | what it is for | may import |
|---|---|---|
| `low` | the ground | |
| `low/cellar` | below it | `low` |
| `high` | above | `low`, `low/cellar` |
"""


def test_a_reach_up_is_found(made_up):
    graph = made_up({
        "__init__": "__version__ = '1'",
        "low.a": "def late():\n    from madeup.high import b",
        "low.cellar.c": "from madeup import __version__\nfrom ..a import late",
        "high.b": "from typing import TYPE_CHECKING\nimport madeup.low.a\nif TYPE_CHECKING:\n    import madeup.attic",
        "low.d": "from madeup import low\nfrom madeup.low.cellar.c import late",
        "low.e": "import madeup",
        "low.f": "from madeup import __version__, low",
        "low.g": "from madeup import __version__, Public",
        "attic": "",
    })  # fmt: skip
    assert breaches(graph, rooms(MAP)) == [
        "madeup.attic lies in no room",
        "madeup.low.a imports madeup.high.b",
        "madeup.low.d imports madeup.low.cellar.c",
        "madeup.low.e imports madeup",
        "madeup.low.g imports madeup",
    ]


def test_a_circle_is_found(made_up):
    graph = made_up(
        {"low.a": "import madeup.low.b", "low.b": "def late():\n    from . import c", "low.c": "from .a import x"}
    )
    assert circles(graph)[0] == "madeup.low.a -> madeup.low.b -> madeup.low.c -> madeup.low.a"
    assert not circles(made_up({"low.c": "x = 1"}))


def top_level(tree: ast.Module) -> set[str]:
    """Names that a module defines; imported ones do not count."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, ast.AnnAssign) else []
        names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


@functools.cache
def sources() -> dict[str, ast.Module]:
    files = sorted((ROOT / "codebook").rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in files}


def test_each_top_level_name_lives_in_one_module():
    where = defaultdict(list)
    for file, tree in sources().items():
        for name in top_level(tree) - REPEATED:
            where[name].append(file)
    assert not {name: files for name, files in where.items() if len(files) > 1}


def test_docstrings_and_help_begin_with_a_noun():
    """No "Of results.json.", in docstrings and in texts for options alike; and none of the odd words."""
    odd = re.compile(r"(?m)^\s*(?:\w+: )?Of |\b(?:[Hh]ears how many|[Dd]ear(?:est)?|the rather kept|[Tt]ells one)\b")
    found = [
        f"{file}:{node.lineno}: {node.value.splitlines()[0]}"
        for file, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and odd.search(node.value)
    ]
    assert not found


def test_every_public_name_can_be_reached():
    assert {name for name in codebook.__all__ if not hasattr(codebook, name)} == set()
    assert set(codebook.__all__) <= set(dir(codebook))


def test_hooks_and_workflows_run_what_make_runs():
    """One set of commands: what is green here is green there."""
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    files = [ROOT / ".pre-commit-config.yaml", *(ROOT / ".github/workflows").iterdir()]
    commands = [command for file in files for command in re.findall(r"(?:run|entry): (.*)", file.read_text())]
    assert {"make lint", "make test"} <= set(commands)
    for command in commands:
        program, *words = command.split()
        assert command == "git diff --exit-code" or (program == "make" and set(words) <= targets), command


def test_no_test_module_imports_another():
    """What tests share lives in modules of its own: a test file can be moved, split or deleted alone."""
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in getattr(node, "names", []) if isinstance(node, ast.Import | ast.ImportFrom)]
            parts = set(chain(*(name.split(".") for name in names)))
            assert not [part for part in parts if part.startswith("test_")], file
