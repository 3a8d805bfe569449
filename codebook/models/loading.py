"""Loading a model and its processor by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from codebook.errors import CodebookError
from codebook.models.base import Model, Processor
from codebook.models.registry import family_of_config

SHIPPED_MODELS = {"miniature": Path(__file__).parents[1] / "miniature" / "weights"}
"""Folders of the models that ship with the package, by the name that `load` takes."""


def load(name: str, device: str | None = None, dtype: torch.dtype | None = None) -> tuple[Model, Processor]:
    """Load a model and its processor for inference.

    Parameters
    ----------
    name
        `miniature` (ships with the package), a folder, or a name on the Hugging Face Hub.
    device
        Default: `cuda` when there is one, else `cpu`.
    dtype
        Default: float32 on the CPU, elsewhere the type that the checkpoint names.

    Returns
    -------
    (model, processor)

    Raises
    ------
    CodebookError
        If the model cannot be found, read, or is of a family that is not supported.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = str(SHIPPED_MODELS.get(name, name))
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise CodebookError(f"{name} holds no config.json: name a transformers model folder")
    local: dict[str, Any] = {"local_files_only": Path(source).is_dir()}
    try:
        family_of_config(AutoConfig.from_pretrained(source, **local))  # before gigabytes are read
        chosen: Any = dtype or (torch.float32 if device == "cpu" else "auto")
        with _silent() if name in SHIPPED_MODELS else contextlib.nullcontext():
            model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=chosen, **local)
        return model.to(device).eval(), AutoProcessor.from_pretrained(source, **local)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, ImportError) and "torchvision" in reason.lower():
            raise CodebookError(
                f"the processor of {name} needs torchvision, which is not installed: install the torchvision that goes "
                f"with torch {torch.__version__.split('+')[0]}"
            ) from None
        raise CodebookError(f"cannot load {name}: {reason}; name `miniature`, a folder or a hub model") from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """A context without transformers' progress bars, for weights that load in a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
