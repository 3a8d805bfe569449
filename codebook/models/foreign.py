"""Model types whose class is code that comes with a checkpoint, and what to use in their place."""

from __future__ import annotations

from codebook.errors import CodebookError, did_you_mean, quoted
from codebook.models.registry import FAMILIES

INSTEAD = {
    "internvl_chat": "internvl, such as OpenGVLab/InternVL3-1B-hf",
    "llava_llama": "llava, such as llava-hf/llava-1.5-7b-hf",
    "llava_mistral": "llava_next, such as llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava_onevision, such as llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "minicpmo": "minicpmv4_6, such as openbmb/MiniCPM-V-4.6",
    "minicpmv": "minicpmv4_6, such as openbmb/MiniCPM-V-4.6",
    "multi_modality": "deepseek_vl, such as deepseek-community/deepseek-vl-1.3b-chat",
    "ovis": "ovis2, such as thisisiron/Ovis2-1B-hf",
}
"""The type of the same model converted for transformers, or of the next one, and a checkpoint of it."""


def foreign_type_error(name: str, model_type: str) -> CodebookError:
    """The error for a model of a type that transformers has no class for."""
    remedy = f"use a checkpoint of type {INSTEAD[model_type]}" if model_type in INSTEAD else (
        f"{did_you_mean(model_type, FAMILIES)}use a checkpoint that was converted to a type of docs/models.md"
    )  # fmt: skip
    return CodebookError(
        f"{name} is of type {quoted(model_type)}, which transformers has no class for, and code that comes with a "
        f"model is never run: {remedy}"
    )
