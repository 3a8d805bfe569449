"""Image pruning in vLLM (https://docs.vllm.ai), by its own plug-in interface: nothing in vLLM is patched.

vLLM calls `register`, the entry point `codebook` of the group `vllm.general_plugins`, in every process that it starts.
"""

from __future__ import annotations

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


def register() -> None:
    """Name this package's classes to vLLM, which imports a class when a model is to be run by it.

    Called several times per process: what is registered is left as it is.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    there = ModelRegistry.get_supported_archs()
    for module, name in ARCHITECTURES.values():
        if name not in there:
            ModelRegistry.register_model(name, f"{__name__}.{module}:{name}")
