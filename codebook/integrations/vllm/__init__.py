"""Image pruning in vLLM (https://docs.vllm.ai), by its own plug-in interface: nothing in vLLM is patched.

vLLM calls `register`, the entry point `codebook` of the group `vllm.general_plugins`, in every process that it starts.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from codebook import __version__

ARCHITECTURES = {
    "internvl": ("grids", "CodebookInternVLForConditionalGeneration"),
    "llava": ("llava", "CodebookLlavaForConditionalGeneration"),
    "llava_next": ("llava", "CodebookLlavaNextForConditionalGeneration"),
    "llava_onevision": ("grids", "CodebookLlavaOnevisionForConditionalGeneration"),
    "qwen2_5_vl": ("mrope", "CodebookQwen2_5_VLForConditionalGeneration"),
    "qwen2_vl": ("mrope", "CodebookQwen2VLForConditionalGeneration"),
    "qwen3_vl": ("mrope", "CodebookQwen3VLForConditionalGeneration"),
}
"""For each family its module in this package and its class, which `architectures` of `--hf-overrides` names."""


AT_VERSIONS = "@"
"""Between a class's name and the versions that it is inspected in."""


def register() -> None:
    """Name this package's classes to vLLM, which imports a class when a model is to be run by it.

    What a class can do vLLM keeps in a cache of its user's, in a file named after module and class, until the source of
    that module changes. But it also depends on vLLM's own class, from which ours is derived, and on the other files
    here. So the module is this package, of which newer versions of vLLM read every file, and the class's name has the
    versions of both.

    Called several times per process: what is registered is left as it is.
    """
    import vllm
    from vllm.model_executor.models.registry import ModelRegistry

    there = ModelRegistry.get_supported_archs()
    for _, name in ARCHITECTURES.values():
        if name not in there:
            ModelRegistry.register_model(name, f"{__name__}:{name}{AT_VERSIONS}{vllm.__version__}-{__version__}")


def __getattr__(name: str) -> Any:
    """A class by its name, with versions behind it or not: it is imported here, when vLLM asks for it."""
    plain = name.partition(AT_VERSIONS)[0]
    for module, own in ARCHITECTURES.values():
        if own == plain:
            return getattr(import_module(f"{__name__}.{module}"), own)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
