"""The one mechanism that prunes any supported model: plain torch hooks, gone when the last context is left.

Every stage works alike, whatever its layer: the input of that decoder layer is gathered down to the text and the kept
visual tokens, values that the pruner merged are written over theirs, and from there on each layer gets hidden states,
rotary embeddings and a mask of that shorter sequence, and stores only its keys and values. Before the LLM means layer
0. Which logical columns a cache layer stores (`KeptIndex`) is all that is needed to make any later mask: decoding,
ragged batches, continuation.

Hooks belong to the model and are shared by all of its contexts (`Attachment`); what a call needs lives with the call.
A call is one `generate`, or one forward outside of it. Which context prunes it is decided once, when it starts, and
holds until it ends, whatever contexts open and close meanwhile. While it runs, its state is in context variables: every
thread, and every asyncio task, has its own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor

from codebook import models
from codebook.errors import CodebookError
from codebook.models import Encoded
from codebook.models.base import Model
from codebook.pruning.engine import prompt
from codebook.pruning.engine.cache import PrunedLayer, pruned_layer
from codebook.pruning.engine.forward import Chosen, Forward, unusable_mask
from codebook.pruning.engine.sequence import Given
from codebook.pruning.engine.tap import tap
from codebook.pruning.engine.views import Cached

if TYPE_CHECKING:  # a schedule makes contexts; a context only reads what a schedule says
    from codebook.pruning.schedule import Schedule

ATTENTION = {"cpu": ("sdpa", "eager"), "cuda": ("sdpa", "eager", "flex_attention")}
"""Kernels of the LLM's attention, by device: compiled for CPUs, FlexAttention with a dense mask ends the process."""

Scope = Literal["model", "thread"]

_lock = threading.RLock()
"""Guards what contexts of several threads share: attachments, and who is open or in flight on them."""
_attached: weakref.WeakKeyDictionary[Model, Attachment] = weakref.WeakKeyDictionary()


class Pruning:
    """The context in which a model's visual tokens are pruned by a schedule; made by calling the schedule.

    Parameters
    ----------
    scope
        `model`: every call of the model that starts while the context is open is pruned, whatever its thread. One such
        context can be open on a model at a time. `thread`: only calls of the thread, or asyncio task, that opened it,
        and it takes precedence there; calls elsewhere are pruned by their own contexts or not at all.

    Attributes
    ----------
    images : list[Image]
        After a forward with images: those that its prompts show, in order of rows, and how their tokens are laid out.
        The forward is the last of the asking thread; of any thread, if that one has had none.
    kept : list[list[Tensor]]
        For each of them the tokens (int64) that survived each stage, by their places among the image's visual tokens:
        `image.locate` gives grid, row and column; in an image of one grid it is the raster position.
    """

    def __init__(self, model: Model, schedule: Schedule, scope: Scope = "model") -> None:
        if scope not in ("model", "thread"):
            raise CodebookError(f"scope must be 'model' or 'thread', not {scope!r}")
        self.model, self.schedule, self.scope = model, schedule, scope
        self.family = models.family(model)
        self.lm = model.get_decoder()
        schedule.check_layers(len(self.lm.layers))
        device, attention = model.device.type, self.lm.config._attn_implementation
        if attention not in (able := ATTENTION.get(device, ATTENTION["cpu"])):
            names = " or ".join(f"'{name}'" for name in able)
            raise CodebookError(
                f"attention '{attention}' is not supported on {device}: load the model with attn_implementation={names}"
            )
        if schedule.positions == "compact" and self.family.axes > 1:
            raise CodebookError(
                f"positions of {self.family.name} have {self.family.axes} axes and cannot be renumbered: use "
                "positions='keep'"
            )
        self.stages = {stage.layer: stage for stage in schedule.stages}
        self.open = False
        self.seen_images = self.seen_prompt = False
        self.calls = 0  # in flight
        self.taps = contextlib.ExitStack()
        self._attachment: Attachment | None = None
        self._owner: Any = None
        self._latest: Forward | None = None
        self._own = threading.local()

    def __repr__(self) -> str:
        state = "open" if self.open else "closed"
        return f"<Pruning of {type(self.model).__name__} by '{self.schedule}', scope {self.scope}, {state}>"

    def __enter__(self) -> Pruning:
        with _lock:
            attachment = _attached.get(self.model) or Attachment(self.model)
            self._owner, self.seen_images, self.seen_prompt = _owner(), False, False
            attachment.add(self)
            self._attachment, self.open = attachment, True
        if self.scope == "thread":
            _scoped.set((*_scoped.get(), self))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._attachment is not None
        self._attachment.end()  # a forward of this thread that was interrupted
        _encoded.set(())
        _scoped.set(tuple(other for other in _scoped.get() if other is not self))
        with _lock:
            self.open, idle = False, not self.calls
            self._attachment.settle(self)
        # What calls in flight have encoded they will still show.
        if kind is None and idle and self.seen_images and not self.seen_prompt:
            raise CodebookError(
                "images were encoded in this context, but no forward of the model showed them, so nothing was pruned: "
                f"call the {type(self.model).__name__} itself with input_ids and pixel_values, not its parts"
            )

    @property
    def images(self) -> list[models.Image]:
        shown = getattr(self._own, "last", self._latest)
        return [] if shown is None or shown.prompt is None else list(shown.prompt.images)

    @property
    def kept(self) -> list[list[Tensor]]:
        shown = getattr(self._own, "last", self._latest)
        return [] if shown is None else shown.log

    def show(self, forward: Forward) -> None:
        """Take a forward with images for the latest, of its thread and of all."""
        self._own.last = self._latest = forward


@dataclass
class _Call:
    """One `generate` or lone forward of a model, and what is decided for all of it when it starts.

    Attributes
    ----------
    pruning
        What prunes it; None for a plain call.
    length
        Tokens of the prompt that `generate` was given; None for a lone forward.
    ids, chosen
        What its first forward with images showed (B, L), and which tokens were chosen there. Without a KV cache every
        step shows the whole prompt again: it then keeps the same tokens instead of asking anew.
    """

    attachment: Attachment
    pruning: Pruning | None
    length: int | None = None
    ids: Tensor | None = None
    chosen: Chosen = field(default_factory=dict)


@dataclass
class _Running:
    """A forward while it runs: its call, whether that ends with it, and what the base model was given.

    `direct` is a forward straight to the decoder, past the base model.
    """

    call: _Call
    lone: bool
    direct: bool = False
    given: dict[str, Any] | None = None
    kinds: tuple[str, ...] = ()
    blocks: Tensor | None = None


_scoped: ContextVar[tuple[Pruning, ...]] = ContextVar("codebook_scoped", default=())
"""Contexts of scope `thread` that this thread or task is in, innermost last."""
_call: ContextVar[_Call | None] = ContextVar("codebook_call", default=None)
_running: ContextVar[_Running | None] = ContextVar("codebook_running", default=None)
_forward: ContextVar[Forward | None] = ContextVar("codebook_forward", default=None)
_encoding: ContextVar[Encoded | None] = ContextVar("codebook_encoding", default=None)
_encoded: ContextVar[tuple[tuple[Any, Encoded], ...]] = ContextVar("codebook_encoded", default=())
"""What was encoded and not shown to a forward yet, or only to the one that runs: outputs and their calls."""


class Attachment:
    """The hooks on one model, for all contexts that are open on it."""

    def __init__(self, model: Model) -> None:
        self.family, self.lm = models.family(model), model.get_decoder()
        self._model = weakref.ref(model)
        self._pruning: list[Pruning] = []  # open, or closed with calls in flight
        self._outputs: dict[int, tuple[weakref.ref[Any], Encoded]] = {}
        self._signature = inspect.signature(model.base_model.forward)
        self._undo = contextlib.ExitStack()

    def __reduce_ex__(self, _: Any) -> NoReturn:
        # The copy's hooks would belong to contexts of the original, and answers of the copy would silently be wrong.
        raise CodebookError("a model inside a pruning context cannot be copied or saved: leave the context first")

    @property
    def model(self) -> Model:
        return self._model()

    # Contexts: under the lock

    def add(self, pruning: Pruning) -> None:
        """Let a context in, or refuse it beside those that are open."""
        for other in self._pruning:
            if other is pruning:
                raise CodebookError("this pruning context is open already: make another one by calling the schedule")
            mine = other._owner == pruning._owner
            if other.open and other.scope == pruning.scope and (mine or pruning.scope == "model"):
                raise CodebookError(
                    "the model is already being pruned: join the stages in one schedule instead of nesting"
                    if mine
                    else "the model is already being pruned by a context of another thread: call the model inside that "
                    "one, or open this one with scope='thread'"
                )
        if not self._pruning:
            self._attach()
            _attached[self.model] = self
        self._pruning.append(pruning)
        try:
            for stage in pruning.schedule.stages:
                if stage.pruner.uses_attention:
                    layer = self.lm.layers[stage.layer - 1]
                    pruning.taps.callback(tap(layer.self_attn, partial(self._on_attention, stage.layer)))
            if any(stage.pruner.uses_vision for stage in pruning.schedule.stages):
                pruning.taps.callback(tap(self.family.vision_attention(self.model), self._on_vision_attention))
        except BaseException:
            self.settle(pruning)
            raise

    def settle(self, pruning: Pruning) -> None:
        """Take down what a context that is closed needs no longer, and the hooks with the last one.

        Calls that started in it may outlive it, as in a thread that streams: they end as they began.
        """
        if pruning.open or pruning.calls:
            return
        pruning.taps.close()
        self._pruning.remove(pruning)
        if not self._pruning:
            self._undo.close()
            _attached.pop(self.model, None)

    def _attach(self) -> None:
        model, base = self.model, self.model.base_model
        with contextlib.ExitStack() as undo:
            for module, hook in (
                (base, self._on_base),
                (self.lm, self._on_decoder),
                *((layer, partial(self._on_layer, i)) for i, layer in enumerate(self.lm.layers)),
            ):
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            undo.callback(self.family.tower(model).register_forward_pre_hook(self._on_tower).remove)
            # Called after an error too, so that no state is left for the next forward.
            undo.callback(self.lm.register_forward_hook(self._after_decoder, always_call=True).remove)
            undo.callback(base.register_forward_hook(self._after_base, always_call=True).remove)
            undo.enter_context(_wrapped(model, "generate", self._generate))
            for kind in models.KINDS:
                # `generate` calls it before the first forward, and no module's arguments hold as much.
                if hasattr(base, name := f"get_{kind}_features"):
                    undo.enter_context(_wrapped(base, name, partial(self._encode, kind)))
            undo.enter_context(self.family.patched_extra_inputs(model, self._gather))
            self._undo = undo.pop_all()

    # Calls

    def _begin(self, length: int | None = None) -> _Call:
        """A call that starts now: what prunes it is decided here, once."""
        with _lock:
            pruning = self._in_force()
            if pruning is not None:
                pruning.calls += 1
        return _Call(self, pruning, length)

    def _in_force(self) -> Pruning | None:
        """What prunes a call of this thread that starts now: its innermost own context, else the model's."""
        for pruning in reversed(_scoped.get()):
            if pruning.open and pruning._attachment is self:
                return pruning
        return next((pruning for pruning in self._pruning if pruning.open and pruning.scope == "model"), None)

    def _pruning_now(self) -> Pruning | None:
        """What prunes the call that this thread is in, or one that it started now."""
        running = self._own_running()
        call = self._current() or (None if running is None else running.call)
        return self._in_force() if call is None else call.pruning

    def _finish(self, call: _Call) -> None:
        if call.pruning is not None:
            with _lock:
                call.pruning.calls -= 1
                self.settle(call.pruning)

    def _current(self) -> _Call | None:
        call = _call.get()
        return call if call is not None and call.attachment is self else None

    def _generate(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._current() is not None:  # a part of the generation that is running
            return stock(*args, **kwargs)
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        call = self._begin(ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None)
        token, encoded = _call.set(call), _encoded.set(_encoded.get())
        try:
            return stock(*args, **kwargs)
        finally:
            self.end()
            _call.reset(token)
            _encoded.reset(encoded)
            self._finish(call)

    def end(self) -> None:
        """Forget the forward that this thread is in, if it is this model's: it is over, or was interrupted."""
        running = _running.get()
        if running is None or running.call.attachment is not self:
            return
        _running.set(None)
        _forward.set(None)
        _encoded.set(tuple((output, call) for output, call in _encoded.get() if not call.shown))
        if running.lone:
            self._finish(running.call)

    # Encoding

    def _encode(self, kind: str, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _encoding.get() is not None or self._pruning_now() is None:
            return stock(*args, **kwargs)  # a part of the encoding that is being noted, or of a plain call
        noted = Encoded(kind, dict(inspect.signature(stock).bind_partial(*args, **kwargs).arguments))
        token = _encoding.set(noted)
        try:
            output = stock(*args, **kwargs)
        finally:
            _encoding.reset(token)
        _encoded.set((*((o, c) for o, c in _encoded.get() if c.kind != kind), (output, noted)))
        with contextlib.suppress(TypeError):  # a plain tuple or tensor is known in this thread alone
            key = id(output)
            self._outputs[key] = weakref.ref(output, lambda _: self._outputs.pop(key, None)), noted
        return output

    def _call_of(self, kind: str, given: dict[str, Any]) -> Encoded | None:
        """The call that encoded a forward's images, if it was made in a context of this model."""
        output = (given.get("mm_encoder_outputs") or {}).get(kind)
        found = [call for own, call in _encoded.get() if call.kind == kind and (output is None or own is output)]
        if not found and output is not None and id(output) in self._outputs:
            reference, call = self._outputs[id(output)]
            found = [call] if reference() is output and call.kind == kind else []
        if not found:
            return None
        found[-1].shown = True
        return found[-1]

    def _on_tower(self, *_: Any) -> None:
        if (pruning := self._pruning_now()) is not None:
            pruning.seen_images = True

    def _on_vision_attention(self, query: Tensor, key: Tensor, scaling: float) -> None:
        if (encoding := _encoding.get()) is not None:
            if self.family.tower_rows:  # in one call; `remember` may have let the new images through before
                encoding.attention.clear()
            encoding.attention.append((query, key, scaling))

    # Forwards

    def _own_running(self) -> _Running | None:
        running = _running.get()
        return running if running is not None and running.call.attachment is self else None

    def _on_base(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.end()
        call = self._current()
        running = _Running(call or self._begin(), call is None)
        _running.set(running)
        if (pruning := running.call.pruning) is None:
            return
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        kinds = tuple(kind for kind, pixels in models.KINDS.items() if _has_images(given, kind, pixels))
        pruning.seen_prompt |= bool(kinds)  # from here on its images are pruned, or the caller is told why not
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if ids is None and (kinds or (embeds is not None and embeds.shape[1] > 1)):
            raise CodebookError("pass input_ids: from inputs_embeds alone the visual tokens cannot be found")
        for _, noted in _encoded.get():  # chunked prefill of some versions loses the images without a word
            waits = not noted.shown and noted.kind not in kinds
            if waits and ids is not None and torch.isin(ids, self.family.token(self.model, noted.kind)).any():
                raise models.whole_images_error(
                    noted.kind, f"{noted.kind} tokens came without the {noted.kind}s that were encoded for them"
                )
        # Without kinds, image tokens are text: generated ones, or of an earlier turn.
        blocks = self.family.blocks(self.model, given)
        length = None if ids is None else ids.shape[1]
        # A later turn's token types may speak of the cached tokens too: those of this forward are the last ones.
        running.blocks = blocks if blocks is None or length is None else blocks[:, -length:]
        running.given, running.kinds = given, kinds

    def _on_decoder(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running, embeds = self._own_running(), kwargs.get("inputs_embeds")
        if running is None:  # text alone, straight to the decoder: only shape and device matter
            call = self._current()
            running = _Running(call or self._begin(), call is None, direct=True)
            _running.set(running)
            if running.call.pruning is not None and embeds is not None and embeds.shape[1] > 1:
                raise CodebookError(
                    "the decoder was called with inputs_embeds: from those alone the visual tokens cannot be found; "
                    f"call the {type(self.model).__name__} itself with input_ids and pixels"
                )
        pruning, given = running.call.pruning, running.given
        if pruning is None:
            return
        if embeds is None:
            ids = args[0] if args else kwargs["input_ids"]
            embeds = torch.empty(*ids.shape, 0, device=ids.device, dtype=self.model.dtype)
        # Some base models make masks of their own from the one that they were given.
        mask = (kwargs if given is None else given).get("attention_mask")
        compact = pruning.schedule.positions == "compact"
        if given is None or not running.kinds:
            plain = Given(embeds, mask)
            _forward.set(Forward(self.family, self.model, plain, {}, blocks=running.blocks, compact=compact))
            return
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise unusable_mask()
        whole = Given(embeds, mask, self._extra(running.call, embeds, given.get("past_key_values")))
        encoded = {kind: self._call_of(kind, given) for kind in running.kinds}
        found = prompt.find(
            self.family, self.model, whole, given["input_ids"], encoded,
            shared=pruning.schedule.quotas == "shared", usual=pruning.schedule.spread,
        )  # fmt: skip
        chosen = self._chosen(running.call, given["input_ids"])
        forward = Forward(self.family, self.model, whole, pruning.stages, found, running.blocks, compact, chosen)
        _forward.set(forward)
        pruning.show(forward)

    def _extra(self, call: _Call, embeds: Tensor, cache: Any) -> int:
        """How many of a forward's tokens come after the prompt of its generation."""
        if call.length is None:
            return 0
        past = 0 if cache is None else int(cache.get_seq_length())
        return min(max(0, past + embeds.shape[1] - call.length), embeds.shape[1] - 1)

    def _chosen(self, call: _Call, ids: Tensor) -> Chosen:
        """What this generation has chosen for this very prompt; empty for a new one, to be filled."""
        if call.length is None:
            return {}
        own = ids[:, : call.length]
        if call.ids is None or not torch.equal(call.ids, own):
            call.ids, call.chosen = own, {}
        return call.chosen

    def _on_layer(self, i: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = _forward.get()
        if forward is None or self._own_running() is None:
            return None
        hidden, before = args[0], _encoded.get()
        hidden = forward.enter(i, hidden)
        _encoded.set(before)  # a stage may encode an image anew: that call is no prompt's
        cache = kwargs.get("past_key_values")
        entry = cache.layers[i] if cache is not None and i < len(cache.layers) else None
        past = entry.index if isinstance(entry, PrunedLayer) else None
        if forward.sequence is None and past is None:
            forward.before = layer, kwargs["position_embeddings"]
            return None
        pruned = None if cache is None else pruned_layer(cache, i)
        cached = Cached(past, 0, 0) if pruned is None else Cached(past, pruned.get_seq_length(), pruned.physical)
        index, mask, rotary = forward.view(layer, cached, kwargs)
        if pruned is not None:
            pruned.index = index
        forward.before = layer, rotary
        # Without position ids, or flash attention would take the gaps in them for packed sequences.
        changed = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
        return (hidden, *args[1:]), kwargs | changed

    def _gather(self, x: Tensor) -> Tensor:
        forward = _forward.get()
        return x if forward is None or forward.sequence is None else forward.sequence.gather(x)

    def _on_attention(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        forward = _forward.get()
        if forward is not None and forward.prompt is not None and layer in forward.stages:
            forward.heard = query, key, scaling

    def _after_decoder(self, _: Any, args: tuple[Any, ...], output: Any) -> Any:
        forward, running = _forward.get(), self._own_running()
        _forward.set(None)
        if running is not None and running.direct:
            self.end()
        if forward is None or forward.sequence is None or output is None:
            return None
        if isinstance(output, tuple):
            return (forward.restore(output[0]), *output[1:])
        output.last_hidden_state = forward.restore(output.last_hidden_state)
        return output

    def _after_base(self, *_: Any) -> None:
        self.end()


def _owner() -> tuple[int, Any]:
    """The thread, and the asyncio task in it, that runs now."""
    import asyncio

    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, function: Callable[..., Any]) -> Any:
    """A context in which `owner.name(...)` is `function(stock, ...)`, for this object alone."""
    stock, own = getattr(owner, name), vars(owner).get(name)

    @functools.wraps(stock)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(stock, *args, **kwargs)

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


def _has_images(given: dict[str, Any], kind: str, pixels: str) -> bool:
    return given.get(pixels) is not None or (given.get("mm_encoder_outputs") or {}).get(kind) is not None
