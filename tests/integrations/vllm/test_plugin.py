"""The entry point, without vLLM: what is named is there, and costs vLLM's processes nothing."""

import subprocess
import sys
import tomllib
from pathlib import Path

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
        "module = sys.modules['vllm.model_executor.models.registry'] = types.ModuleType('registry')\n"
        "module.ModelRegistry = Registry\n"
        "from codebook.integrations.vllm import register\n"
        "register(), register()\n"
        "assert Registry.there['CodebookLlavaForConditionalGeneration'] == (\n"
        "    'codebook.integrations.vllm.llava:CodebookLlavaForConditionalGeneration')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
