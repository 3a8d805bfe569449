"""The state of a call: decided when it starts, and carried in context variables while it runs.

A call is one `generate`, or one forward outside of it. Every thread and every asyncio task has variables of its own, so
calls that run side by side on one model do not see each other.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from codebook.pruning.engine.forward import Chosen, Forward

if TYPE_CHECKING:
    from codebook.pruning.engine.attachment import Attachment
    from codebook.pruning.engine.context import Pruning


@dataclass
class Call:
    """One `generate` or lone forward of a model, and what is decided for all of it when it starts.

    Attributes
    ----------
    pruning
        What prunes it; None for a plain call.
    length
        Tokens of the prompt that `generate` was given; None for a lone forward.
    prompt, chosen
        What entered the decoder for the prompt (B, L, d) in its first forward with images, and which tokens were chosen
        there. Without a KV cache every step shows the whole prompt again: it then keeps the same tokens instead of
        asking anew.
    counted
        Whether that prompt is in the context's statistics already.
    """

    attachment: Attachment
    pruning: Pruning | None
    length: int | None = None
    prompt: Tensor | None = None
    counted: bool = False
    chosen: Chosen = field(default_factory=dict)


@dataclass
class Running:
    """A forward while it runs: its call, whether that ends with it, and what the base model was given.

    `direct` is a forward straight to the decoder, past the base model.
    """

    call: Call
    lone: bool
    direct: bool = False
    given: dict[str, Any] | None = None
    kinds: tuple[str, ...] = ()
    blocks: Tensor | None = None


SCOPED: ContextVar[tuple[Pruning, ...]] = ContextVar("codebook_scoped", default=())
"""Contexts of scope `thread` that this thread or task is in, innermost last."""
CALL: ContextVar[Call | None] = ContextVar("codebook_call", default=None)
"""The generation that this thread or task is in."""
RUNNING: ContextVar[Running | None] = ContextVar("codebook_running", default=None)
"""The forward that it is in."""
FORWARD: ContextVar[Forward | None] = ContextVar("codebook_forward", default=None)
"""What that forward has pruned; None before its decoder begins, and in plain calls."""


def owner() -> tuple[int, Any]:
    """The thread, and the asyncio task in it, that runs now."""
    import asyncio

    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task
