"""Checks that a model's weights and outputs are numbers: damage, and overflow of half precision, make them NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from codebook.errors import CodebookError
from codebook.models.base import Model


def overflown(logits: Tensor) -> Tensor:
    """Whether any of the logits, of any shape, is NaN or infinite; minus infinity only rules a token out. () bool."""
    return (~(logits < torch.inf)).any()


def damage(values: Tensor) -> Tensor:
    """NaN for each vector (d,) of (..., d) that is not finite, 0 for others; (...,), without a wait.

    By the extremes, not by a sum, which may overflow where all values are finite.
    """
    return values.amax(-1) * 0 + values.amin(-1) * 0


def check_logits(logits: Tensor) -> None:
    """Raise a CodebookError if any of the logits, of any shape, is NaN or infinite."""
    if bool(overflown(logits)):
        raise CodebookError(
            "the model's outputs are not numbers (NaN): its weights are damaged, or float16 is too narrow for them; "
            "load it again, or in bfloat16 or float32"
        )


def check_weights(name: str, model: Model) -> None:
    """Raise a CodebookError if a weight of the model `name` is NaN or infinite, naming the tensors."""
    here = [(key, p.detach()) for key, p in model.named_parameters() if p.numel() and not p.is_meta]
    here = [(key, part) for key, p in here for part in plain_tensors(p)]
    floats = [(key, p) for key, p in here if p.is_floating_point()]
    # Asked for on the device, for all of them before the first answer is waited for.
    good = [torch.stack(torch.aminmax(p.float() if p.dtype.itemsize < 2 else p)).isfinite().all() for _, p in floats]
    if bad := [key for (key, _), fine in zip(floats, good, strict=True) if not fine]:
        raise CodebookError(
            f"weights of {name} are not numbers (NaN or infinite): {some(bad)}; the file is damaged, or float16 is too "
            "narrow for them: fetch it again, or load it in bfloat16 or float32"
        )


def plain_tensors(weight: Tensor) -> list[Tensor]:
    """The tensors that a weight is made of: quantised numbers and their scales, as torchao has them, or it itself."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [part for name in weight.__tensor_flatten__()[0] for part in plain_tensors(getattr(weight, name))]


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(name[:80] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
