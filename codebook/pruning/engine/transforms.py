"""Calls that torch records or maps over a batch, instead of running them for the picture at hand."""

from __future__ import annotations

import torch
from torch._C import _functorch

from codebook.errors import CodebookError


def check_plain_call() -> None:
    """Refuse a call whose choice of tokens would become part of a graph, or would be asked of many pictures at once."""
    levels = _functorch.get_interpreter_stack() or ()
    mapped = any(level.key() == _functorch.TransformType.Vmap for level in levels)
    if mapped or torch.jit.is_tracing() or torch.compiler.is_compiling():
        what = "mapped over a batch by torch.vmap" if mapped else "traced or exported"
        remedy = "call it with one batch of inputs" if mapped else "do so outside of it, where nothing is pruned"
        raise CodebookError(
            f"a model inside a pruning context cannot be {what}, since each picture keeps tokens of its own: {remedy}"
        )
