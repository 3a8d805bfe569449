"""The hooks on one model, shared by all contexts that are open on it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from codebook import models
from codebook.errors import CodebookError
from codebook.models.base import Model, cache_of, decoder
from codebook.models.replacing import replaced
from codebook.pruning.engine import prompt
from codebook.pruning.engine.cache import PrunedLayer, check_cache, check_given, pruned_layer
from codebook.pruning.engine.call import CALL, FORWARD, RUNNING, SCOPED, Call, Running
from codebook.pruning.engine.encodings import ENCODED, Encodings
from codebook.pruning.engine.forward import Chosen, Forward, check_mask
from codebook.pruning.engine.kernels import check_attention
from codebook.pruning.engine.key_bias import ADDED
from codebook.pruning.engine.sequence import Given
from codebook.pruning.engine.tap import LISTENING, point, tap
from codebook.pruning.engine.transforms import check_plain_call
from codebook.pruning.engine.views import Cached, View

if TYPE_CHECKING:
    from codebook.pruning.engine.context import Pruning

ATTACHING = threading.RLock()
"""Guards what the contexts of several threads share: who is open, and who is in flight, on which model."""

SLOT = "_codebook_attachment"
"""Attribute of the base model that holds its attachment: both are freed together, also where a context stays open."""


class Attachment:
    """The hooks on one model, for all contexts that are open on it."""

    def __init__(self, model: Model) -> None:
        self.family, self.lm = models.family(model), decoder(model)
        self._layers = list(self.lm.layers)
        self._recurrent = [models.is_recurrent(layer) for layer in self._layers]
        self._attending = [i for i, recurrent in enumerate(self._recurrent) if not recurrent]
        self._keys = self.family.keys_layers(model)
        self._storing = [i for i in self._attending if self._keys[i] == i]
        self._model = weakref.ref(model)
        self._pruning: list[Pruning] = []  # open, or closed with calls in flight
        self.encodings = Encodings(self.family.tower_rows)
        self._signature = inspect.signature(model.base_model.forward)
        self._undo = contextlib.ExitStack()

    @classmethod
    def of(cls, model: Model) -> Attachment:
        """The attachment of a model that has one, or a new one."""
        return vars(model.base_model).get(SLOT) or cls(model)

    def __reduce_ex__(self, _: Any) -> NoReturn:
        # The copy's hooks would belong to contexts of the original, and answers of the copy would silently be wrong.
        # Every hook is a method of the attachment, or holds one, and so brings whoever copies or saves the model here.
        raise CodebookError("a model inside a pruning context cannot be copied or saved: leave the context first")

    @property
    def model(self) -> Model:
        """The model, which the attachment alone does not keep alive."""
        return self._model()

    # Contexts: under the lock

    def add(self, pruning: Pruning, owner: tuple[int, Any]) -> None:
        """Open a context of a thread or task, or refuse it beside those that are open."""
        for other in self._pruning:
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
        if pruning.model not in (self.model, self.model.base_model):  # its `generate` has no hook
            raise CodebookError(
                f"the {type(self.model.base_model).__name__} inside this {type(pruning.model).__name__} is being "
                f"pruned as part of another {type(self.model).__name__}: open both contexts on one and the same model"
            )
        if not self._pruning:
            self._attach()
            setattr(self.model.base_model, SLOT, self)
        self._pruning.append(pruning)
        pruning.owner, pruning.seen_images, pruning.seen_prompt = owner, False, False
        try:
            for stage in pruning.schedule.stages:
                if stage.pruner.uses_attention:
                    self.family.check_attention()
                    module = self._asked(stage.layer, stage.pruner.own_layer)
                    pruning.taps.callback(tap(module, self._weak(self._on_attention, stage.layer)))
            if any(stage.pruner.uses_vision for stage in pruning.schedule.stages):
                for attention in self.family.vision_attentions(self.model):
                    pruning.taps.callback(tap(attention, self._weak(self.encodings.hear)))
            pruning.open = True
        finally:
            self.settle(pruning)  # where a tap failed

    @staticmethod
    def _weak(method: Callable[..., None], *first: Any) -> Callable[..., None]:
        """A method for a tap, whose list would otherwise keep the attachment, and so the model, for ever."""
        found = weakref.WeakMethod(method)

        def call(*args: Any) -> None:
            if (own := found()) is not None:
                own(*first, *args)

        return call

    def _asked(self, layer: int, own: bool) -> Any:
        """The attention whose queries and keys a stage at this layer is given: its own layer's or the one's before."""
        before = not own
        if not self._recurrent[layer - before]:
            return self.lm.layers[layer - before].self_attn
        able = [str(i + before) for i in self._attending]
        raise CodebookError(
            f"a stage at layer {layer} that needs attention has none to ask: layer {layer - before} of this decoder is "
            f"recurrent; use layer {' or '.join(able)}"
        )

    def settle(self, pruning: Pruning) -> None:
        """Take down what a context that is closed needs no longer, and the hooks with the last one.

        Calls that started in it may outlive it, as in a thread that streams: they end as they began.
        """
        if pruning.open or pruning.calls:
            return
        pruning.taps.close()
        pruning.pointed = False
        self._pruning.remove(pruning)
        if not self._pruning:
            self._undo.close()
            delattr(self.model.base_model, SLOT)

    def _attach(self) -> None:
        model, base = self.model, self.model.base_model
        with contextlib.ExitStack() as undo:
            for module, hook in (
                (base, self._on_base),
                (self.lm, self._on_decoder),
                *((layer, partial(self._on_layer, i)) for i, layer in enumerate(self.lm.layers)),
            ):
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for tower in self.family.towers(model):
                undo.callback(tower.register_forward_pre_hook(self._on_tower).remove)
            # Called after an error too, so that no state is left for the next forward.
            for module, hook in ((self.lm, self._after_decoder), (base, self._after_base)):
                undo.callback(module.register_forward_hook(hook, always_call=True).remove)
            for module in dict.fromkeys((model, base, self.lm)):
                # What torch.compile made of a call may be older than the hooks, and would run without them: it does not
                # look for new ones, but whether the object has a `forward` of its own.
                undo.enter_context(replaced(module, "forward", torch.compiler.disable))
            if hasattr(model, "generate"):  # a model without a head has none
                undo.enter_context(replaced(model, "generate", partial(_around, self._generate)))
            for kind in models.KINDS:
                # `generate` calls it before the first forward, and no module's arguments hold as much.
                if hasattr(base, name := f"get_{kind}_features"):
                    undo.enter_context(replaced(base, name, partial(_around, partial(self._encode, kind))))
            undo.enter_context(self.family.patched_extra_inputs(model, self._gather))
            self._undo = undo.pop_all()

    # Calls

    def _begin(self, length: int | None = None) -> Call:
        """A call that starts now: what prunes it is decided here, once; inside another call it is what prunes that."""
        outer = self._current()
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

    def in_force(self) -> Pruning | None:
        """What prunes a call of this thread that starts now: its innermost own context, else the model's."""
        for pruning in reversed(SCOPED.get()):
            if pruning.open and pruning.attachment is self:
                return pruning
        return next((pruning for pruning in self._pruning if pruning.open and pruning.scope == "model"), None)

    def enabled(self) -> Pruning | None:
        """The context that `enable` opened."""
        return next((pruning for pruning in self._pruning if pruning.open and pruning.enabled), None)

    def _pruning_now(self) -> Pruning | None:
        """What prunes the call that this thread is in, or one that it started now."""
        running = self._own_running()
        call = self._current() or (None if running is None else running.call)
        return self.in_force() if call is None else call.pruning

    def _finish(self, call: Call) -> None:
        if call.pruning is not None:
            with ATTACHING:
                call.pruning.calls -= 1
                self.settle(call.pruning)

    def _current(self) -> Call | None:
        call = CALL.get()
        return call if call is not None and call.attachment is self else None

    def _generate(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._pruning:  # the contexts were left, and something that others have put around this stays
            return stock(*args, **kwargs)
        outer = self._current()  # such as that of a model which is its own assistant
        if any(_has_images(kwargs, kind, pixels) for kind, pixels in models.KINDS.items()) and self._pruning_now():
            given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
            check_cache(kwargs, given, self.model.generation_config)
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        call = self._begin(ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None)
        # What waits to be shown by the generation around this one is not for this one.
        token, encoded = CALL.set(call), ENCODED.set(ENCODED.get() if outer is None else ())
        try:
            return stock(*args, **kwargs)
        finally:
            self.end()
            CALL.reset(token)
            ENCODED.reset(encoded)
            self._finish(call)

    def end(self) -> None:
        """Forget the forward that this thread is in, if it is this model's: it is over, or was interrupted."""
        running = RUNNING.get()
        if running is None or running.call.attachment is not self:
            return
        RUNNING.set(None)
        FORWARD.set(None)
        ADDED.set(None)
        self.encodings.forget(shown=True)
        if running.lone:
            self._finish(running.call)

    def _encode(self, kind: str, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._pruning_now() is None:
            return stock(*args, **kwargs)
        return self.encodings.note(kind, stock, *args, **kwargs)

    def _on_tower(self, *_: Any) -> None:
        if (pruning := self._pruning_now()) is not None:
            pruning.seen_images = True

    # Forwards

    def _own_running(self) -> Running | None:
        running = RUNNING.get()
        return running if running is not None and running.call.attachment is self else None

    @torch.compiler.disable
    def _on_base(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.end()
        call = self._current()
        running = Running(call or self._begin(), call is None)
        RUNNING.set(running)
        if (pruning := running.call.pruning) is None:
            return
        check_plain_call()
        if decoder(self.model) is not self.lm or list(self.lm.layers) != self._layers:
            raise CodebookError(
                "parts of the decoder were replaced since this pruning context was opened, and have no hooks: leave it "
                "and open it again around the model as it is now"
            )
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        kinds = tuple(kind for kind, pixels in models.KINDS.items() if _has_images(given, kind, pixels))
        pruning.seen_prompt |= bool(kinds)  # from here on its images are pruned, or the caller is told why not
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if ids is None and (kinds or (embeds is not None and embeds.shape[1] > 1)):
            raise CodebookError("pass input_ids: from inputs_embeds alone the visual tokens cannot be found")
        for _, _, noted in self.encodings.noted():  # chunked prefill of some versions loses the images without a word
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

    @torch.compiler.disable
    def _on_decoder(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeds = kwargs.get("inputs_embeds")
        running = self._own_running() or self._on_decoder_alone(embeds)
        pruning, given = running.call.pruning, running.given
        if pruning is None:
            return
        if self.lm.training and torch.is_grad_enabled() and getattr(self.lm.layers[0], "gradient_checkpointing", False):
            raise CodebookError(  # the layers run again in the backward pass, where no forward is there to shorten them
                "gradient checkpointing runs layers again after the forward, which pruning cannot follow: call "
                "model.gradient_checkpointing_disable(), or model.eval()"
            )
        if embeds is None:
            ids = args[0] if args else kwargs["input_ids"]
            embeds = torch.empty(*ids.shape, 0, device=ids.device, dtype=self.model.dtype)
        # It may have been changed since the context was opened.
        check_attention(self.lm.config._attn_implementation, embeds.device.type)
        # Some base models make masks of their own from the one that they were given.
        mask = (kwargs if given is None else given).get("attention_mask")
        flat = isinstance(mask, Tensor) and mask.dim() == 2  # else refused where it is of use
        cache = cache_of(kwargs)
        check_given(cache, mask if flat else None, embeds.shape[1], self._storing, pruned=bool(running.kinds))
        if given is None or not running.kinds:
            compact, plain = pruning.schedule.positions == "compact", Given(embeds, mask)
            FORWARD.set(Forward(self.family, self.model, plain, {}, blocks=running.blocks, compact=compact))
            return
        check_mask(mask)
        self._check_length(embeds.shape[1], cache)
        chosen = self._chosen(running.call, embeds)
        whole = Given(embeds, mask, 0 if chosen is None else self._extra(running.call, embeds, cache))
        self._find_images(running, pruning, whole, given, chosen)

    def _on_decoder_alone(self, embeds: Tensor | None) -> Running:
        """A forward straight to the decoder, of text alone: only its shape and device matter."""
        call = self._current()
        running = Running(call or self._begin(), call is None, direct=True)
        RUNNING.set(running)
        if running.call.pruning is not None and embeds is not None and embeds.shape[1] > 1:
            raise CodebookError(
                "the decoder was called with inputs_embeds: from those alone the visual tokens cannot be found; "
                f"call the {type(self.model).__name__} itself with input_ids and pixels"
            )
        return running

    def _find_images(
        self, running: Running, pruning: Pruning, whole: Given, given: dict[str, Any], chosen: Chosen | None
    ) -> None:
        """Find the images that a forward shows, for its stages to prune, before its first layer."""
        encoded = {kind: self.encodings.show(kind, given) for kind in running.kinds}
        found = prompt.find(
            self.family, self.model, whole, given["input_ids"], encoded,
            shared=pruning.schedule.quotas == "shared", usual=pruning.schedule.spread,
        )  # fmt: skip
        forward = Forward(
            self.family, self.model, whole, pruning.stages, found, running.blocks,
            pruning.schedule.positions == "compact", chosen, pruning.tally,
        )  # fmt: skip
        FORWARD.set(forward)
        pruning.show(list(found.images), forward.log)

    def _check_length(self, length: int, cache: Any) -> None:
        """Raise a CodebookError for a prompt that is longer than the family can prune right."""
        most = self.family.longest(self.model)
        length += 0 if cache is None else cache.get_seq_length()
        if most is not None and length > most:
            raise CodebookError(
                f"a prompt of {length} tokens is too long to prune {self.family.name}, which scales attention by the "
                f"place in the prompt from there on: use at most {most}, with fewer or smaller images"
            )

    def _extra(self, call: Call, embeds: Tensor, cache: Any) -> int:
        """How many of a forward's tokens come after the prompt of its generation."""
        if call.length is None:
            return 0
        past = 0 if cache is None else int(cache.get_seq_length())
        return min(max(0, past + embeds.shape[1] - call.length), embeds.shape[1] - 1)

    def _chosen(self, call: Call, embeds: Tensor) -> Chosen | None:
        """What this generation has chosen for its prompt; empty at first, to be filled.

        None for another prompt, or the same with other images, as a logits processor may ask in between.
        """
        if call.length is None:
            return None
        own = embeds[:, : call.length].detach()
        if call.prompt is None:  # not compared with itself, for which the host would wait
            call.prompt = own
            return call.chosen
        return call.chosen if torch.equal(call.prompt, own) else None

    def _on_layer(self, i: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward, running = FORWARD.get(), self._own_running()
        if forward is None or running is None:
            if self._pruning_now() is not None:  # else what nobody prunes
                raise CodebookError(
                    f"layer {i} of the decoder was run past the decoder's hooks, as by a call of its `forward`, and "
                    f"would not be pruned: call the {type(self.model).__name__} itself"
                )
            return None
        _check_added()
        hidden, before, cache = args[0], ENCODED.get(), cache_of(kwargs)
        entry = cache.layers[i] if cache is not None and i < len(cache.layers) else None
        past = entry.index if isinstance(entry, PrunedLayer) else None
        if reused := forward.cached.get(self._keys[i]):  # of an earlier layer, whose keys this one attends to
            past = reused.kept

        def view() -> tuple[View, PrunedLayer | None]:
            if reused is not None:
                return forward.view(layer, reused, hidden.shape[1], kwargs), None
            pruned = None if cache is None else pruned_layer(cache, i)
            cached = Cached(past, 0, 0) if pruned is None else Cached(past, pruned.get_seq_length(), pruned.physical)
            forward.cached[i] = cached
            return forward.view(layer, cached, hidden.shape[1], kwargs), pruned

        if forward.asks_own_layer(i):
            stock = forward.sequence is None and past is None
            forward.ask(layer, hidden, kwargs["position_embeddings"] if stock else view()[0].rotary, kwargs)
        hidden = forward.enter(i, hidden)
        ENCODED.set(before)  # a stage may encode an image anew: that call is no prompt's
        if self._recurrent[i]:
            forward.asked = None
            own = {} if forward.sequence is None else {"attention_mask": forward.sequence.own}
            return (hidden, *args[1:]), kwargs | own
        if forward.sequence is None and past is None:
            forward.asked = layer, kwargs["position_embeddings"]
            return None
        (index, mask, bias, rotary), pruned = view()
        if pruned is not None:
            pruned.coming = index
        forward.asked = layer, rotary
        if bias is not None:
            self._point(running.call.pruning)
            ADDED.set(bias)
        # Without position ids, or flash attention would take the gaps in them for packed sequences.
        changed = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
        for name in self.family.per_token:
            if kwargs.get(name) is not None:
                changed[name] = self._gather(kwargs[name])
        beside = (self._gather(x)[:, -hidden.shape[1] :] if isinstance(x, Tensor) else x for x in args[1:])
        return (hidden, *beside), kwargs | changed

    def _point(self, pruning: Pruning | None) -> None:
        """Have the layers' attention add numbers to its logits for as long as the context prunes: at the first need."""
        assert pruning is not None
        if pruning.pointed:
            return
        with ATTACHING:
            if not pruning.pointed:
                pruning.taps.callback(point([self.lm.layers[i].self_attn for i in self._attending]))
                pruning.pointed = True

    def _gather(self, x: Tensor) -> Tensor:
        forward = FORWARD.get()
        return x if forward is None or forward.sequence is None else forward.sequence.gather(x)

    def _on_attention(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        forward = FORWARD.get()
        if forward is None or forward.prompt is None or layer not in forward.stages:
            return
        if forward.stages[layer].pruner.own_layer == LISTENING.get():  # its own layer also runs once it has chosen
            forward.heard = query, key, scaling

    @torch.compiler.disable
    def _after_decoder(self, _: Any, args: tuple[Any, ...], output: Any) -> Any:
        forward, running = FORWARD.get(), self._own_running()
        FORWARD.set(None)
        if forward is not None and output is not None:
            _check_added()
            _check_ran(forward)
            if running is not None:
                self._count(running.call, forward)
        if running is not None and running.direct:
            self.end()
        if forward is None or forward.sequence is None or output is None:
            return None
        if isinstance(output, tuple):
            return (forward.restore(output[0]), *output[1:])
        output.last_hidden_state = forward.restore(output.last_hidden_state)
        return output

    def _count(self, call: Call, forward: Forward) -> None:
        """Add a forward that ended well to its context's statistics, once for each prompt of a generation."""
        if call.pruning is None or forward.prompt is None or (forward.chosen is call.chosen and call.counted):
            return
        call.counted |= forward.chosen is call.chosen
        images = forward.prompt.images
        tokens = sum(image.count for image in images)
        layers = len(self.lm.layers)
        seen = forward.seen(layers)
        call.pruning.tally.add(len(images), tokens, seen)
        logging.getLogger(__name__).debug(
            "%d images: %.0f of %d visual tokens, by '%s'", len(images), seen / layers, tokens, call.pruning.schedule
        )

    @torch.compiler.disable
    def _after_base(self, *_: Any) -> None:
        self.end()


def _check_added() -> None:
    """Raise a CodebookError if the layer before was to add numbers to its attention, and did not."""
    if ADDED.get() is not None:
        ADDED.set(None)
        raise CodebookError("a layer's attention does not go through transformers' attention functions, so what it "
                            "sees cannot be said: load the model with attn_implementation='eager'")  # fmt: skip


def _check_ran(forward: Forward) -> None:
    """Raise a CodebookError if a stage's layer was not run."""
    if any(len(stages) < len(forward.stages) for stages in forward.log):
        layer = sorted(forward.stages)[min(map(len, forward.log))]
        raise CodebookError(
            f"layer {layer} of the decoder was not run, so that its stage has pruned nothing: leave the stage out, or "
            "set num_hidden_layers of the model's config back"
        )


def _around(function: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """What calls `function(stock, ...)` and looks like `stock`."""

    @functools.wraps(stock)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(stock, *args, **kwargs)

    return wrapper


def _has_images(given: dict[str, Any], kind: str, pixels: str) -> bool:
    return given.get(pixels) is not None or (given.get("mm_encoder_outputs") or {}).get(kind) is not None
