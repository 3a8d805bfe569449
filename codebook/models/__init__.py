"""Stock transformers models: loading them, and the little that differs between families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from codebook.errors import CodebookError
from codebook.models.base import Family
from codebook.models.gemma3 import Gemma3
from codebook.models.idefics3 import Idefics3, SmolVLM
from codebook.models.internvl import InternVL
from codebook.models.layout import KINDS, Encoded, Grid, Image, Layout, whole
from codebook.models.llava import Llava
from codebook.models.llava_next import LlavaNext
from codebook.models.llava_onevision import LlavaOnevision
from codebook.models.paligemma import PaliGemma
from codebook.models.qwen2_vl import Qwen2VL, Qwen25VL
from codebook.models.qwen3_vl import Qwen3VL

__all__ = ["FAMILIES", "KINDS", "Encoded", "Family", "Grid", "Image", "Layout", "family", "load", "whole"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Llava(),
        LlavaNext(),
        LlavaOnevision(),
        Qwen2VL(),
        Qwen25VL(),
        Qwen3VL(),
        InternVL(),
        Idefics3(),
        SmolVLM(),
        Gemma3(),
        PaliGemma(),
    )
}

LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of decoder layers that can be pruned."""


def family(model: Any) -> Family:
    """The family of a loaded model.

    Raises
    ------
    CodebookError
        If the family, or this variant of it, is not supported.
    """
    return _known(model.config)


def load(name: str, device: str | None = None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a model and its processor for inference.

    Parameters
    ----------
    name
        `miniature` (ships with the package), a folder, or a name on the Hugging Face Hub.
    device
        Default: `cuda` when there is one, else `cpu`.
    dtype
        Default: float32 on the CPU, the checkpoint's own type elsewhere.

    Returns
    -------
    (model, processor)

    Raises
    ------
    CodebookError
        If the model cannot be found, read, or is of a family that is not supported.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "miniature":
        from codebook import miniature

        small: Any
        small, processor = miniature.load(device=device)
        return small if dtype is None else small.to(dtype), processor

    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise CodebookError(f"{name} holds no config.json: name a transformers model folder")
    try:
        _known(AutoConfig.from_pretrained(name))  # before gigabytes are read
        chosen: Any = dtype or (torch.float32 if device == "cpu" else "auto")
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=chosen)
        return model.to(device).eval(), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, ImportError) and "torchvision" in reason.lower():
            raise CodebookError(
                f"the processor of {name} needs torchvision, which is not installed: install the torchvision that goes "
                f"with torch {torch.__version__.split('+')[0]}"
            ) from None
        raise CodebookError(f"cannot load {name}: {reason}; name `miniature`, a folder or a hub model") from None


def _known(config: Any) -> Family:
    name, text = config.model_type, config.get_text_config()
    if getattr(text, "cross_attention_layers", None):
        raise CodebookError(
            f"models of type {name} cross-attend to their images: there are no visual tokens in the sequence to prune; "
            "use a model that puts them there, such as llava or qwen2_5_vl"
        )
    if odd := set(getattr(text, "layer_types", None) or ()) - LAYERS:
        kinds = " and ".join(sorted(odd))
        raise CodebookError(
            f"models of type {name} have a decoder with {kinds}, whose state cannot lose single tokens; use a model "
            "with full attention, such as qwen3_vl"
        )
    if name not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise CodebookError(f"models of type {name} are not supported; use one of: {supported}")
    return FAMILIES[name].check(config)
