"""Public names: found without importing torch, typed for editors, and one list of methods behind them all."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import codebook
from codebook.pruning import METHODS, Pruner

ROOT = Path(__file__).parent.parent


def test_importing_the_package_imports_no_torch():
    script = (
        "import sys, codebook\n"
        "from codebook import CodebookError\n"
        "assert not hasattr(codebook, 'nonsense') and not hasattr(codebook, '__wrapped__')\n"
        "assert 'torch' not in sys.modules and 'codebook.pruning' not in sys.modules\n"
        "assert 'Schedule' in dir(codebook) and 'models' not in codebook.__all__\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_schedules_and_a_service_of_scores_import_no_transformers():
    script = (
        "import sys, codebook, codebook.serving.server\n"
        "from codebook import Codebook, Schedule\n"
        "assert 'transformers' not in sys.modules and 'remember' in codebook.__all__\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_names_that_are_not_there_are_refused():
    for name in ("Nonsense", "nonsense", "alpha"):
        with pytest.raises(AttributeError, match=f"'codebook' has no attribute '{name}'"):
            getattr(codebook, name)


def test_every_method_is_public():
    for method in METHODS.values():
        assert getattr(codebook, method.kind.__name__) is method.kind
        assert method.kind.__name__ in codebook.__all__ and method.kind.__name__ in codebook.pruning.__all__
    star: dict = {}
    exec("from codebook import *", star)
    assert set(codebook.__all__) <= set(star) and set(codebook.__all__) <= set(dir(codebook))


CHECKER = """
[mypy]
strict = True
ignore_missing_imports = True
[mypy-torch.*,transformers.*,numpy.*,PIL.*,safetensors.*,ray.*,matplotlib.*,pydantic.*]
follow_imports = skip
[mypy-codebook.*]
ignore_errors = True
"""
"""A strict user's settings, without the types of the large libraries: they cost a minute."""


def test_type_checkers_see_what_each_name_is(tmp_path):
    """In a user's file; a name without a type of its own would be Any."""
    api = pytest.importorskip("mypy.api")
    lines = ["import codebook", *(f"reveal_type(codebook.{name})" for name in codebook.__all__)]
    lines += ["from codebook.pruning import METHODS, Schedule", "reveal_type(METHODS['alpha'])", "codebook.Nonsense"]
    lines += ["reveal_type(codebook.Schedule.for_model(None).budget(576, 32))"]
    (tmp_path / "user.py").write_text("\n".join(lines))
    (tmp_path / "mypy.ini").write_text(CHECKER)
    options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    said, errors, _ = api.run([*options, str(tmp_path / "user.py")])
    assert not errors, errors
    found = [line.partition("Revealed type is ")[2] for line in said.splitlines() if "Revealed type" in line]
    assert len(found) == len(codebook.__all__) + 2 and '"Any"' not in found
    assert found[-2:] == ['"codebook.pruning.methods.registry.Method"', '"float"']
    assert [line for line in said.splitlines() if "error:" in line] == [
        f'{tmp_path / "user.py"}:{len(lines) - 1}: error: Module has no attribute "Nonsense"  [attr-defined]'
    ]


def test_stubs_name_what_is_there():
    """Each `__init__.pyi` against its module: the same names from the same places, and all of them."""
    for here in (codebook, codebook.pruning, codebook.pruning.methods):
        seen = set()
        for node in ast.parse(Path(here.__file__ + "i").read_text()).body:
            if isinstance(node, ast.ImportFrom):
                home = __import__(node.module, fromlist=["x"])
                for name in home.__all__ if node.names[0].name == "*" else [alias.name for alias in node.names]:
                    assert getattr(here, name) is getattr(home, name)
                    seen.add(name)
        assert set(here.__all__) - seen <= {"METHODS"}  # which the stub declares


def callables():
    """Every public function, class and method: name, docstring, parameters, and the source that the docstring is of."""
    for name in codebook.__all__:
        one = getattr(codebook, name)
        if inspect.isfunction(one):
            yield name, inspect.getdoc(one), inspect.signature(one).parameters, inspect.getsource(one)
        if not inspect.isclass(one):
            continue
        told = inspect.getdoc(one)
        if not issubclass(one, Exception):
            yield name, told, [field.name for field in fields(one)] if is_dataclass(one) else [], ""
        for key, member in vars(one).items():
            kind = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if not key.startswith("_") and inspect.isfunction(kind):
                parameters = [given for given in inspect.signature(kind).parameters if given not in ("self", "cls")]
                source = inspect.getsource(kind) if kind.__doc__ else ""
                yield f"{name}.{key}", inspect.getdoc(getattr(one, key)), parameters, source


def test_docstrings_name_each_parameter_and_what_is_raised():
    for name, told, parameters, source in callables():
        assert told, name
        for parameter in parameters:
            assert re.search(rf"\b{parameter}\b", told), f"{name} says nothing of {parameter}"
        if any(isinstance(node, ast.Raise) for node in ast.walk(ast.parse(textwrap.dedent(source)))):
            assert re.search(r"(?i)\braise", told), f"{name} does not say what it raises"


def test_pruners_of_one_name_are_of_one_class():
    assert all(issubclass(method.kind, Pruner) for method in METHODS.values())
    assert len({repr(method) for method in METHODS.values()}) == len(METHODS)


def test_nobody_is_sent_to_another_project():
    """On PyPI `codebook` is another project; this one is `redundancy-codebook`."""
    other = re.compile(r"pip install\b[^`\n]*(?<![\w./-])codebook\b")
    assert other.search("pip install 'codebook[cpu]'") and not other.search("pip install 'redundancy-codebook[cpu]'")
    texts = [*ROOT.glob("*"), *(file for room in ("codebook", "docs", ".github") for file in (ROOT / room).rglob("*"))]
    for file in texts:
        if file.suffix in (".py", ".md", ".yml", ".yaml", ".html") or file.name in ("Dockerfile", "Makefile"):
            assert not other.search(file.read_text()), file
