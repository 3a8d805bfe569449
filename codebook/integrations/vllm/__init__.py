"""Image pruning in vLLM (https://docs.vllm.ai), by its own plug-in interface: nothing in vLLM is patched.

vLLM calls `register`, the entry point `codebook` of the group `vllm.general_plugins`, in every process that it starts.
"""

from __future__ import annotations

ARCHITECTURES = {
    "CodebookInternVLForConditionalGeneration": "grids",
    "CodebookLlavaForConditionalGeneration": "llava",
    "CodebookLlavaNextForConditionalGeneration": "llava",
    "CodebookLlavaOnevisionForConditionalGeneration": "grids",
    "CodebookQwen2VLForConditionalGeneration": "mrope",
    "CodebookQwen2_5_VLForConditionalGeneration": "mrope",
    "CodebookQwen3VLForConditionalGeneration": "mrope",
}
"""Module in this package of each class that vLLM can be told to run, as `architectures` of `--hf-overrides`."""


def register() -> None:
    """Name this package's classes to vLLM, which imports a class when a model is to be run by it.

    Called several times per process: what is registered is left as it is.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    there = ModelRegistry.get_supported_archs()
    for name, module in ARCHITECTURES.items():
        if name not in there:
            ModelRegistry.register_model(name, f"{__name__}.{module}:{name}")
