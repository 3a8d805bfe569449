"""What the hooks on a model's parts do: find the images of a forward, and give each layer what is left of them."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from codebook import models
from codebook.errors import CodebookError
from codebook.models.base import Model, cache_of, decoder
from codebook.pruning.engine import deltas, prompt
from codebook.pruning.engine.cache import PrunedLayer, check_given, pruned_layer
from codebook.pruning.engine.calls import ATTACHING, FORWARD, Call, Calls, Running, has_images
from codebook.pruning.engine.encodings import ENCODED
from codebook.pruning.engine.forward import Chosen, Forward, check_mask
from codebook.pruning.engine.kernels import check_attention
from codebook.pruning.engine.key_bias import ADDED
from codebook.pruning.engine.sequence import Given
from codebook.pruning.engine.tap import LISTENING, point
from codebook.pruning.engine.transforms import check_plain_call
from codebook.pruning.engine.views import Cached, View

if TYPE_CHECKING:
    from codebook.pruning.engine.context import Pruning


class Hooks:
    """The hooks of one model, for all contexts that are open on it.

    Attributes
    ----------
    family, lm
        The model's family, and its decoder.
    """

    def __init__(self, model: Model, calls: Calls) -> None:
        self._calls = calls
        self.family, self.lm = models.family(model), decoder(model)
        self._layers = list(self.lm.layers)
        self._recurrent = [models.is_recurrent(layer) for layer in self._layers]
        self._attending = [i for i, recurrent in enumerate(self._recurrent) if not recurrent]
        self._keys = self.family.keys_layers(model)
        self._storing = [i for i in self._attending if self._keys[i] == i]
        self._signature = inspect.signature(model.base_model.forward)

    def asked(self, layer: int, own: bool) -> Any:
        """The attention whose queries and keys a stage at this layer is given: its own layer's or the one's before."""
        before = not own
        if not self._recurrent[layer - before]:
            return self.lm.layers[layer - before].self_attn
        able = [str(i + before) for i in self._attending]
        raise CodebookError(
            f"a stage at layer {layer} that needs attention has none to ask: layer {layer - before} of this decoder is "
            f"recurrent; use layer {' or '.join(able)}"
        )

    # Each hook is given what torch gives hooks of its kind, or a tap its receiver.

    @torch.compiler.disable
    def on_base(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the base model: begin a forward, and note what it is given."""
        self._calls.end()
        running = self._calls.run()
        if (pruning := running.call.pruning) is None:
            return
        check_plain_call()
        if decoder(self._calls.model) is not self.lm or list(self.lm.layers) != self._layers:
            raise CodebookError(
                "parts of the decoder were replaced since this pruning context was opened, and have no hooks: leave it "
                "and open it again around the model as it is now"
            )
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        kinds = tuple(kind for kind, pixels in models.KINDS.items() if has_images(given, kind, pixels))
        pruning.seen_prompt |= bool(kinds)  # from here on its images are pruned, or the caller is told why not
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if ids is None and (kinds or (embeds is not None and embeds.shape[1] > 1)):
            raise CodebookError("pass input_ids: from inputs_embeds alone the visual tokens cannot be found")
        # Chunked prefill of some versions loses the images without a word.
        for kind in {encoded.kind for encoded in self._calls.encodings.waiting()}.difference(kinds):
            if ids is not None and torch.isin(ids, self.family.token(self._calls.model, kind)).any():
                raise models.whole_images_error(
                    kind, f"{kind} tokens came without the {kind}s that were encoded for them"
                )
        # Without kinds, image tokens are text: generated ones, or of an earlier turn.
        blocks = self.family.blocks(self._calls.model, given)
        length = None if ids is None else ids.shape[1]
        # A later turn's token types may speak of the cached tokens too: those of this forward are the last ones.
        running.blocks = blocks if blocks is None or length is None else blocks[:, -length:]
        running.given, running.kinds = given, kinds
        if self._calls.has_deltas and given.get("position_ids") is None:
            deltas.begin(self._calls.model, given)

    @torch.compiler.disable
    def on_decoder(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder: find the images, for the stages."""
        embeds = kwargs.get("inputs_embeds")
        running = self._calls.running() or self._on_decoder_alone(embeds)
        pruning, given = running.call.pruning, running.given
        if pruning is None:
            return
        if self._calls.has_deltas and given is not None:
            own = given.get("position_ids") is None
            running.deltas = deltas.current(self._calls.model) if own else running.call.deltas
        if torch.is_grad_enabled() and any(map(_runs_again, self._layers)):
            raise CodebookError(  # in the backward pass, where no forward is there to say what attention adds
                "gradient checkpointing runs layers again after the forward, which pruning cannot follow: call "
                "model.gradient_checkpointing_disable(), or model.eval(), or leave torch's checkpoint wrappers out"
            )
        if embeds is None:
            ids = args[0] if args else kwargs["input_ids"]
            embeds = torch.empty(*ids.shape, 0, device=ids.device, dtype=self._calls.model.dtype)
        # It may have been changed since the context was opened.
        check_attention(self.lm.config._attn_implementation, embeds.device.type)
        # Some base models make masks of their own from the one that they were given.
        mask = (kwargs if given is None else given).get("attention_mask")
        flat = isinstance(mask, Tensor) and mask.dim() == 2  # else refused where it is of use
        cache = cache_of(kwargs)
        check_given(cache, mask if flat else None, embeds.shape[1], self._storing, pruned=bool(running.kinds))
        if given is None or not running.kinds:
            compact, plain = pruning.schedule.positions == "compact", Given(embeds, mask)
            FORWARD.set(Forward(self.family, self._calls.model, plain, {}, blocks=running.blocks, compact=compact))
            return
        check_mask(mask)
        embeds = self.family.entering(self._calls.model, embeds, kwargs)
        self._check_length(embeds.shape[1], cache)
        chosen = _chosen(running.call, embeds)
        whole = Given(embeds, mask, 0 if chosen is None else _extra(running.call, embeds, cache))
        self._find_images(running, pruning, whole, given, chosen)

    def _on_decoder_alone(self, embeds: Tensor | None) -> Running:
        """A forward straight to the decoder, of text alone: only its shape and device matter."""
        running = self._calls.run(direct=True)
        if running.call.pruning is not None and embeds is not None and embeds.shape[1] > 1:
            raise CodebookError(
                "the decoder was called with inputs_embeds: from those alone the visual tokens cannot be found; "
                f"call the {type(self._calls.model).__name__} itself with input_ids and pixels"
            )
        return running

    def _find_images(
        self, running: Running, pruning: Pruning, whole: Given, given: dict[str, Any], chosen: Chosen | None
    ) -> None:
        """Find the images that a forward shows, for its stages to prune, before its first layer."""
        encoded = {kind: self._calls.encodings.show(kind, given) for kind in running.kinds}
        found = prompt.find(
            self.family, self._calls.model, whole, given["input_ids"], encoded,
            shared=pruning.schedule.quotas == "shared", usual=pruning.schedule.spread,
        )  # fmt: skip
        forward = Forward(
            self.family, self._calls.model, whole, pruning.stages, found, running.blocks,
            pruning.schedule.positions == "compact", chosen, pruning.tally,
        )  # fmt: skip
        FORWARD.set(forward)
        pruning.show(list(found.images), forward.log)

    def _check_length(self, length: int, cache: Any) -> None:
        """Raise a CodebookError for a prompt that is longer than the family can prune right."""
        most = self.family.longest(self._calls.model)
        length += 0 if cache is None else cache.get_seq_length()
        if most is not None and length > most:
            raise CodebookError(
                f"a prompt of {length} tokens is too long to prune {self.family.name}, which scales attention by the "
                f"place in the prompt from there on: use at most {most}, with fewer or smaller images"
            )

    def on_layer(self, i: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the decoder's layer `i`: let its stage prune, and give it what is left."""
        forward, running = FORWARD.get(), self._calls.running()
        if forward is None or running is None:
            if self._calls.pruning_now() is not None:  # else what nobody prunes
                raise CodebookError(
                    f"layer {i} of the decoder was run past the decoder's hooks, as by a call of its `forward`, and "
                    f"would not be pruned: call the {type(self._calls.model).__name__} itself"
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
                changed[name] = self.gather(kwargs[name])
        beside = (self.gather(x)[:, -hidden.shape[1] :] if isinstance(x, Tensor) else x for x in args[1:])
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

    def gather(self, x: Tensor) -> Tensor:
        """What is left of a tensor (B, L, ...) that has an entry per token of the forward's input."""
        forward = FORWARD.get()
        return x if forward is None or forward.sequence is None else forward.sequence.gather(x)

    def on_attention(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """As the layer that a stage asks attends: keep its queries and keys."""
        forward = FORWARD.get()
        if forward is None or forward.prompt is None or layer not in forward.stages:
            return
        if forward.stages[layer].pruner.own_layer == LISTENING.get():  # its own layer also runs once it has chosen
            forward.heard = query, key, scaling

    @torch.compiler.disable
    def after_decoder(self, _: Any, args: tuple[Any, ...], output: Any) -> Any:
        """After the decoder: give its output back at full length."""
        forward, running = FORWARD.get(), self._calls.running()
        FORWARD.set(None)
        if forward is not None and output is not None:
            _check_added()
            _check_ran(forward)
            if running is not None:
                self._count(running.call, forward)
                deltas.keep_with(getattr(output, "past_key_values", None), running.deltas, forward.given.batch)
        if running is not None and running.direct:
            self._calls.end()
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
    def after_base(self, *_: Any) -> None:
        """After the base model: end the forward."""
        self._calls.end()


def _chosen(call: Call, embeds: Tensor) -> Chosen | None:
    """What a generation has chosen for its prompt; empty at first, to be filled.

    None for another prompt, or the same with other images, as a logits processor may ask in between.
    """
    if call.length is None:
        return None
    own = embeds[:, : call.length].detach()
    if call.prompt is None:  # not compared with itself, for which the host would wait
        call.prompt = own
        return call.chosen
    return call.chosen if torch.equal(call.prompt, own) else None


def _extra(call: Call, embeds: Tensor, cache: Any) -> int:
    """How many of a forward's tokens come after the prompt of its generation."""
    if call.length is None:
        return 0
    past = 0 if cache is None else int(cache.get_seq_length())
    return min(max(0, past + embeds.shape[1] - call.length), embeds.shape[1] - 1)


def _runs_again(layer: Any) -> bool:
    """Whether a backward pass runs the layer anew: by transformers' checkpointing, or torch's wrapper around it."""
    checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
    return checkpointed or hasattr(layer, "_checkpoint_wrapped_module")


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
