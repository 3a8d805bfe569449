"""The calls of a model: what prunes each is decided when it starts, and its state is carried in context variables.

A call is one `generate`, or one forward outside of it. Every thread and every asyncio task has variables of its own, so
calls that run side by side on one model do not see each other.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from codebook import models
from codebook.errors import CodebookError
from codebook.models.base import Model
from codebook.pruning.engine.cache import check_cache
from codebook.pruning.engine.deltas import Deltas, has_deltas, prepared
from codebook.pruning.engine.encodings import ENCODED, Encodings
from codebook.pruning.engine.forward import Chosen, Forward
from codebook.pruning.engine.key_bias import ADDED

if TYPE_CHECKING:
    from codebook.pruning.engine.context import Pruning

ATTACHING = threading.RLock()
"""Guards what the contexts of several threads share: who is open, and who is in flight, on which model."""


@dataclass
class Call:
    """One `generate` or lone forward of a model, and what is decided for all of it when it starts.

    Attributes
    ----------
    calls
        The calls of its model.
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
    deltas
        How far later positions of its prompt are from their columns, where its model keeps that on itself.
    """

    calls: Calls
    pruning: Pruning | None
    length: int | None = None
    prompt: Tensor | None = None
    counted: bool = False
    chosen: Chosen = field(default_factory=dict)
    deltas: Deltas = None


@dataclass
class Running:
    """A forward while it runs: its call, whether that ends with it, and what the base model was given.

    `direct` is a forward straight to the decoder, past the base model; `deltas` are those of the prompt in its cache.
    """

    call: Call
    lone: bool
    direct: bool = False
    given: dict[str, Any] | None = None
    kinds: tuple[str, ...] = ()
    blocks: Tensor | None = None
    deltas: Deltas = None


SCOPED: ContextVar[tuple[Pruning, ...]] = ContextVar("codebook_scoped", default=())
"""Contexts of scope `thread` that this thread or task is in, innermost last."""
CALL: ContextVar[Call | None] = ContextVar("codebook_call", default=None)
"""The generation that this thread or task is in."""
RUNNING: ContextVar[Running | None] = ContextVar("codebook_running", default=None)
"""The forward that it is in."""
FORWARD: ContextVar[Forward | None] = ContextVar("codebook_forward", default=None)
"""What that forward has pruned; None before its decoder begins, and in plain calls."""


class Calls:
    """The calls of one model, and which of the contexts that are open on it prunes each.

    Attributes
    ----------
    contexts
        Those that are open, or closed with calls in flight.
    encodings
        What the model has encoded.
    has_deltas
        Whether the model keeps on itself how far positions are from columns.
    undo
        What is undone when the last of the contexts is gone.
    """

    def __init__(self, model: Model) -> None:
        self._model = weakref.ref(model)
        self.contexts: list[Pruning] = []
        self.encodings = Encodings(models.family(model).tower_rows)
        self.has_deltas = has_deltas(model)
        self.undo = contextlib.ExitStack()

    def __reduce_ex__(self, _: Any) -> NoReturn:
        # The copy's hooks would belong to contexts of the original, and answers of the copy would silently be wrong.
        # Every hook holds these calls first, and so brings whoever copies or saves the model here.
        raise CodebookError("a model inside a pruning context cannot be copied or saved: leave the context first")

    @property
    def model(self) -> Model:
        """The model, which its calls alone do not keep alive."""
        return self._model()

    def in_force(self) -> Pruning | None:
        """What prunes a call of this thread that starts now: its innermost own context, else the model's."""
        for pruning in reversed(SCOPED.get()):
            if pruning.open and pruning in self.contexts:
                return pruning
        return next((pruning for pruning in self.contexts if pruning.open and pruning.scope == "model"), None)

    def enabled(self) -> Pruning | None:
        """The context that `enable` opened."""
        return next((pruning for pruning in self.contexts if pruning.open and pruning.enabled), None)

    def settle(self, pruning: Pruning) -> None:
        """Take down what a context that is closed needs no longer, and with the last one what all share.

        Under the lock. Calls that started in it may outlive it, as in a thread that streams: they end as they began.
        """
        if pruning.open or pruning.calls:
            return
        pruning.taps.close()
        pruning.pointed = False
        self.contexts.remove(pruning)
        if not self.contexts:
            self.undo.close()

    def begin(self, length: int | None = None) -> Call:
        """A call that starts now: what prunes it is decided here, once; inside another call it is what prunes that."""
        outer = self.current()
        with ATTACHING:
            pruning = self.in_force() if outer is None else outer.pruning
            if outer is None and pruning is not None and not pruning.is_own() and self._in_stock_generate():
                pruning = None
            if pruning is not None:
                pruning.calls += 1
        return Call(self, pruning, length)

    def _in_stock_generate(self) -> bool:
        """Whether this thread is in a generation that began before there were hooks, and so is no call here: a step of
        it that shows the images again, for want of a KV cache, would be pruned where those before were not."""
        code = inspect.unwrap(type(self.model).generate).__code__ if hasattr(self.model, "generate") else None
        frame = inspect.currentframe()
        while frame is not None and not (frame.f_code is code and frame.f_locals.get("self") is self.model):
            frame = frame.f_back
        return frame is not None

    def run(self, direct: bool = False) -> Running:
        """A forward that starts now, in the generation that this thread is in or as a call of its own."""
        call = self.current()
        running = Running(call or self.begin(), call is None, direct)
        RUNNING.set(running)
        return running

    def finish(self, call: Call) -> None:
        """End a call, and with the last one of a closed context what that still needed."""
        if call.pruning is not None:
            with ATTACHING:
                call.pruning.calls -= 1
                self.settle(call.pruning)

    def current(self) -> Call | None:
        """The generation of this model that this thread is in."""
        call = CALL.get()
        return call if call is not None and call.calls is self else None

    def running(self) -> Running | None:
        """The forward of this model that this thread is in."""
        running = RUNNING.get()
        return running if running is not None and running.call.calls is self else None

    def pruning_now(self) -> Pruning | None:
        """What prunes the call that this thread is in, or one that it started now."""
        running = self.running()
        call = self.current() or (None if running is None else running.call)
        return self.in_force() if call is None else call.pruning

    def positions(self, stock: Callable[..., Any], inputs: Tensor, given: dict[str, Any]) -> Any:
        """The positions that `generate` makes, of which the call keeps the deltas."""
        positions, found = prepared(self.model, stock, inputs, given)
        if (call := self.current()) is not None:
            call.deltas = (found,)
        return positions

    def generate(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the model's own `generate` returns, as one call."""
        if not self.contexts:  # the contexts were left, and something that others have put around this stays
            return stock(*args, **kwargs)
        outer = self.current()  # such as that of a model which is its own assistant
        if any(has_images(kwargs, kind, pixels) for kind, pixels in models.KINDS.items()) and self.pruning_now():
            given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
            check_cache(kwargs, given, self.model.generation_config)
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        call = self.begin(ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None)
        # What waits to be shown by the generation around this one is not for this one.
        token, encoded = CALL.set(call), ENCODED.set(ENCODED.get() if outer is None else ())
        try:
            return stock(*args, **kwargs)
        finally:
            self.end()
            CALL.reset(token)
            ENCODED.reset(encoded)
            self.finish(call)

    def encode(self, kind: str, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the model's own `get_image_features` or `get_video_features` returns, noted where a context prunes."""
        if self.pruning_now() is None:
            return stock(*args, **kwargs)
        return self.encodings.note(kind, stock, *args, **kwargs)

    def note_tower(self, *_: Any) -> None:
        """Note that the vision tower runs, a hook."""
        if (pruning := self.pruning_now()) is not None:
            pruning.seen_images = True

    def end(self) -> None:
        """Forget the forward that this thread is in, if it is this model's: it is over, or was interrupted."""
        if (running := self.running()) is None:
            return
        RUNNING.set(None)
        FORWARD.set(None)
        ADDED.set(None)
        self.encodings.forget(shown=True)
        if running.lone:
            self.finish(running.call)


def owner() -> tuple[int, Any]:
    """The thread, and the asyncio task in it, that runs now."""
    import asyncio

    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


def has_images(given: dict[str, Any], kind: str, pixels: str) -> bool:
    """Whether a call is given images or videos: their pixels, or what was encoded of them beforehand."""
    return given.get(pixels) is not None or (given.get("mm_encoder_outputs") or {}).get(kind) is not None
