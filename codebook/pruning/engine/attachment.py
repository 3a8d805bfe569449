"""The hooks on one model, shared by all contexts that are open on it."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from codebook import models
from codebook.errors import CodebookError
from codebook.models.base import Model
from codebook.models.replacing import replaced
from codebook.pruning.engine.calls import Calls
from codebook.pruning.engine.hooks import Hooks
from codebook.pruning.engine.tap import tap

if TYPE_CHECKING:
    from codebook.pruning.engine.context import Pruning

SLOT = "_codebook_attachment"
"""Attribute of the base model that holds its attachment: both are freed together, also where a context stays open."""


class Attachment:
    """The hooks on one model, and its calls, for all contexts that are open on it."""

    def __init__(self, model: Model) -> None:
        self.calls = Calls(model)
        self._hooks = Hooks(model, self.calls)

    @classmethod
    def of(cls, model: Model) -> Attachment:
        """The attachment of a model that has one, or a new one."""
        return vars(model.base_model).get(SLOT) or cls(model)

    def add(self, pruning: Pruning, owner: tuple[int, Any]) -> None:
        """Open a context of a thread or task, or refuse it beside those that are open; under the lock."""
        self._check_beside(pruning, owner)
        if not self.calls.contexts:
            self._attach()
        self.calls.contexts.append(pruning)
        pruning.owner, pruning.seen_images, pruning.seen_prompt = owner, False, False
        hooks, stages = self._hooks, pruning.schedule.stages
        try:
            for stage in stages:
                if stage.pruner.uses_attention:
                    hooks.family.check_attention()
                    module = hooks.asked(stage.layer, stage.pruner.own_layer)
                    pruning.taps.callback(tap(module, _weakly(hooks.on_attention, stage.layer)))
            if any(stage.pruner.uses_vision for stage in stages):
                for attention in hooks.family.vision_attentions(self.calls.model):
                    pruning.taps.callback(tap(attention, _weakly(self.calls.encodings.hear)))
            pruning.open = True
        finally:
            self.calls.settle(pruning)  # where a tap failed

    def _check_beside(self, pruning: Pruning, owner: tuple[int, Any]) -> None:
        for other in self.calls.contexts:
            if other is pruning:
                raise CodebookError("this pruning context is open already: make another one by calling the schedule")
            mine = other.owner == owner
            if other.open and other.scope == pruning.scope and (mine or pruning.scope == "model"):
                if other.enabled:
                    raise CodebookError(
                        f"the model is enabled with '{other.schedule}' already: call codebook.disable(model) first, or "
                        "open this context with scope='thread'"
                    )
                raise CodebookError(
                    "the model is already being pruned: join the stages in one schedule instead of nesting"
                    if mine
                    else "the model is already being pruned by a context of another thread: call the model inside that "
                    "one, or open this one with scope='thread'"
                )
        model = self.calls.model
        if pruning.model not in (model, model.base_model):  # its `generate` has no hook
            raise CodebookError(
                f"the {type(model.base_model).__name__} inside this {type(pruning.model).__name__} is being pruned as "
                f"part of another {type(model).__name__}: open both contexts on one and the same model"
            )

    def _attach(self) -> None:
        calls, hooks, model = self.calls, self._hooks, self.calls.model
        base, family, lm = model.base_model, hooks.family, hooks.lm
        with contextlib.ExitStack() as undo:
            setattr(base, SLOT, self)
            undo.callback(lambda: delattr(calls.model.base_model, SLOT))
            for module, hook in (
                (base, hooks.on_base),
                (lm, hooks.on_decoder),
                *((layer, partial(hooks.on_layer, i)) for i, layer in enumerate(lm.layers)),
            ):
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for tower in family.towers(model):
                undo.callback(tower.register_forward_pre_hook(calls.note_tower).remove)
            # Called after an error too, so that no state is left for the next forward.
            for module, hook in ((lm, hooks.after_decoder), (base, hooks.after_base)):
                undo.callback(module.register_forward_hook(hook, always_call=True).remove)
            for module in dict.fromkeys((model, base, lm)):
                # What torch.compile made of a call may be older than the hooks, and would run without them: it does not
                # look for new ones, but whether the object has a `forward` of its own.
                undo.enter_context(replaced(module, "forward", torch.compiler.disable))
            if hasattr(model, "generate"):  # a model without a head has none
                undo.enter_context(replaced(model, "generate", partial(_around, calls.generate)))
                if calls.has_deltas:
                    name = "_prepare_position_ids_for_generation"
                    undo.enter_context(replaced(model, name, partial(_around, calls.positions)))
            for kind in models.KINDS:
                # `generate` calls it before the first forward, and no module's arguments hold as much.
                if hasattr(base, name := f"get_{kind}_features"):
                    undo.enter_context(replaced(base, name, partial(_around, partial(calls.encode, kind))))
            undo.enter_context(family.patched_extra_inputs(model, hooks.gather))
            calls.undo = undo.pop_all()


def _weakly(method: Callable[..., None], *first: Any) -> Callable[..., None]:
    """A method for a tap, whose list would otherwise keep the attachment, and so the model, for ever."""
    found = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        if (own := found()) is not None:
            own(*first, *args)

    return call


def _around(function: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """What calls `function(stock, ...)` and looks like `stock`."""

    @functools.wraps(stock)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(stock, *args, **kwargs)

    return wrapper
