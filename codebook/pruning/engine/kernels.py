"""Kernels of the LLM's attention with which models can be pruned."""

from __future__ import annotations

from codebook.errors import CodebookError

ATTENTION = {"cpu": ("sdpa", "eager"), "cuda": ("sdpa", "eager", "flex_attention")}
"""Their names, by device: compiled for CPUs, FlexAttention with a dense mask ends the process."""


def check_attention(attention: str, device: str) -> None:
    """Refuse an attention kernel that models on devices of this type cannot be pruned with."""
    if attention not in (able := ATTENTION.get(device, ATTENTION["cpu"])):
        names = " or ".join(f"'{name}'" for name in able)
        raise CodebookError(
            f"attention '{attention}' is not supported on {device}: load the model with attn_implementation={names}"
        )
