"""Stock transformers models: loading them, and the little that differs between families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from codebook.errors import CodebookError
from codebook.models.base import KINDS, Encoded, Family, Grid, Image, Layout
from codebook.models.gemma3 import Gemma3
from codebook.models.idefics3 import Idefics3, SmolVLM
from codebook.models.internvl import InternVL
from codebook.models.llava import Llava
from codebook.models.llava_next import LlavaNext
from codebook.models.llava_onevision import LlavaOnevision
from codebook.models.paligemma import PaliGemma
from codebook.models.qwen2_vl import Qwen2VL, Qwen25VL
from codebook.models.qwen3_vl import Qwen3VL

__all__ = ["FAMILIES", "KINDS", "Encoded", "Family", "Grid", "Image", "Layout", "family", "load"]

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

def family(model: Any) -> Family:
    """The family of a loaded model.

    Raises
    ------
    CodebookError
        If the family, or this variant of it, is not supported.
    """
    return _known(model.config).check(model.config)


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
        _known(config := AutoConfig.from_pretrained(name)).check(config)  # before gigabytes are read
        chosen: Any = dtype or (torch.float32 if device == "cpu" else "auto")
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=chosen)
        return model.to(device).eval(), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CodebookError(f"cannot load {name}: {reason}; name `miniature`, a folder or a hub model") from None


def _known(config: Any) -> Family:
    if config.model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise CodebookError(f"models of type {config.model_type} are not supported; use one of: {supported}")
    return FAMILIES[config.model_type]
