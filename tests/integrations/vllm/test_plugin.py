"""The entry point, without vLLM: what is named is there, and costs vLLM's processes nothing."""

import importlib.util
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import codebook.integrations.vllm as plugin
from codebook.integrations.vllm import ARCHITECTURES
from codebook.models.registry import FAMILIES

ROOT = Path(__file__).parents[3]


def test_the_entry_point_is_the_function():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"codebook": "codebook.integrations.vllm:register"}


def test_every_class_is_in_the_module_that_is_named():
    assert set(ARCHITECTURES) <= set(FAMILIES)
    for module, name in ARCHITECTURES.values():
        source = (ROOT / f"codebook/integrations/vllm/{module}.py").read_text()
        assert f"\nclass {name}(" in source


def test_registering_imports_neither_torch_nor_a_class_and_may_be_done_twice():
    script = (
        "import sys, types\n"
        "class Registry:\n"
        "    there = {}\n"
        "    @classmethod\n"
        "    def get_supported_archs(cls): return cls.there.keys()\n"
        "    @classmethod\n"
        "    def register_model(cls, name, where):\n"
        "        assert name not in cls.there\n"
        "        cls.there[name] = where\n"
        "for name in ('vllm', 'vllm.model_executor', 'vllm.model_executor.models'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "sys.modules['vllm'].__version__ = '1.2.3+cpu'\n"
        "module = sys.modules['vllm.model_executor.models.registry'] = types.ModuleType('registry')\n"
        "module.ModelRegistry = Registry\n"
        "import codebook\n"
        "from codebook.integrations.vllm import register\n"
        "register(), register()\n"
        "assert Registry.there['CodebookLlavaForConditionalGeneration'] == (\n"
        "    'codebook.integrations.vllm:CodebookLlavaForConditionalGeneration@1.2.3+cpu-' + codebook.__version__)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def cached_under(where):
    """A class's file in vLLM's cache, and the sources for which it holds: of a package all, of a module its own."""
    module, name = where.split(":")
    origin = Path(importlib.util.find_spec(module).origin)
    sources = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    return f"{module}-{name}.json", sources


@pytest.fixture
def registered(monkeypatch):
    """Register in a vLLM of a version that is nothing but a registry; returns what was registered, by name."""

    def at(version):
        there = {}
        for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["vllm"].__version__ = version
        registry = types.ModuleType("registry")
        registry.ModelRegistry = types.SimpleNamespace(get_supported_archs=there.keys, register_model=there.__setitem__)
        monkeypatch.setitem(sys.modules, "vllm.model_executor.models.registry", registry)
        plugin.register()
        return there

    return at


def test_what_vllm_keeps_of_a_class_is_not_another_versions_or_another_sources(registered):
    old, new = registered("0.31.0"), registered("0.32.0")
    assert set(old) == set(new) == {name for _, name in ARCHITECTURES.values()}
    folder = ROOT / "codebook/integrations/vllm"
    for name in old:
        (old_file, sources), (new_file, _) = cached_under(old[name]), cached_under(new[name])
        assert old_file != new_file and "/" not in new_file
        assert {folder / "pruned.py", folder / "settings.py", folder / "mrope.py", folder / "llava.py"} <= set(sources)


def test_a_class_is_imported_by_what_is_registered(registered, monkeypatch):
    """vLLM takes the attribute of the module; the class is the one in its own module."""
    where = registered("0.32.0")["CodebookQwen2VLForConditionalGeneration"]
    kind = type("CodebookQwen2VLForConditionalGeneration", (), {})
    stub = types.ModuleType("mrope")
    setattr(stub, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "codebook.integrations.vllm.mrope", stub)
    module, name = where.split(":")
    assert getattr(importlib.import_module(module), name) is kind and getattr(plugin, kind.__name__) is kind
    for absent in ("CodebookOtherForConditionalGeneration", "llava2", "CodebookOther@0.32.0"):
        assert not hasattr(plugin, absent)
