"""One prefill, continued in many ways: the model's answer if some visual tokens were dropped at some layer.

Dropping tokens at layer l changes nothing before l, and nothing at any layer for tokens before the first dropped one:
attention is causal. So one unpruned prefill stores the input of each layer and the KV cache. Every variant then runs
only its later surviving tokens, through layers l and up, on top of the shared keys and values. Variants of different
layers run in one batch, which each joins at its layer. This is exact, because survivors keep their positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from codebook import models
from codebook.errors import CodebookError
from codebook.models import Image
from codebook.models.base import CACHE_NAMES, Model, chunk, decoder, window
from codebook.pruning import Schedule

VARIANTS_PER_FORWARD = 64
"""Most variants per forward."""


class UnsharedError(CodebookError):
    """A model whose prefill cannot be shared; what generates each answer anew, as pruning does, still works."""


@dataclass
class Cost:
    """Work, in tokens times decoder layers.

    Attributes
    ----------
    processed
        Work of the shared prefill and its continuations.
    naive
        Work of one pruned forward per variant: all tokens before its layer, the survivors from there on.
    """

    processed: int = 0
    naive: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.processed + other.processed, self.naive + other.naive)


@dataclass
class Prefill:
    """An unpruned prefill of one prompt, and its continuations; made by `of`.

    Attributes
    ----------
    visual : (n,) int64
        Columns of the prompt's visual tokens, all images' in order.
    images : list[Image]
        Where the images' tokens are, and their grids.
    logits : (vocabulary,) float32
        Logits of the first token of the unpruned model's answer.
    hidden : list of (1, length, width)
        Input of each decoder layer.
    given : list[dict]
        Keyword arguments of each decoder layer.
    cache
        KV cache of the whole prompt.
    cost : Cost
        Work so far.
    """

    model: Model
    visual: Tensor
    images: list[Image]
    logits: Tensor
    hidden: list[Tensor] = field(repr=False)
    given: list[dict[str, Any]] = field(repr=False)
    cache: Any = field(repr=False)
    cost: Cost

    @classmethod
    def of(cls, model: Model, inputs: Any) -> Prefill:
        """Run a prompt through a stock model.

        Parameters
        ----------
        inputs
            The processor's output for one sample, without padding.

        Raises
        ------
        CodebookError
            If the model or the prompt is not supported.
        """
        model = models.unwrap(model)
        watch = Schedule([])(model, "thread")  # drops nothing, refuses what cannot be pruned and finds the images
        ids = inputs["input_ids"]
        if len(ids) != 1 or not bool(inputs["attention_mask"].all()):
            raise CodebookError("a shared prefill is of one sample: pass one row without padding")
        _check_shared(model, inputs)
        with torch.inference_mode(), watch:
            out, hidden, given, last = _run_noting_layers(model, inputs)
        if not watch.images:
            raise CodebookError("the prompt shows no image: there is nothing to drop")
        columns = [
            torch.tensor(image.columns, device=ids.device)[grid.index.to(ids.device)]
            for image in watch.images
            for grid in image.layout.grids
        ]
        logits = out.logits[0, -1].float()
        found = cls(
            model, torch.cat(columns), watch.images, logits, hidden, given, out.past_key_values,
            Cost(ids.shape[1] * len(hidden)),
        )  # fmt: skip
        with torch.inference_mode():
            own = found._head(last[:, -1])[0]
        if (own - logits).abs().max() > 0.02 * logits.abs().max():
            raise UnsharedError(
                "this model changes its logits behind its head, as soft caps do: sweep with --metric generated"
            )
        return found

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.hidden)

    def answers(self, layers: Sequence[int], kept: Tensor, batch_size: int = VARIANTS_PER_FORWARD) -> Tensor:
        """Logits of the answer's first token with only some visual tokens left from a layer on.

        Parameters
        ----------
        layers : (r,)
            For each variant the layer whose input loses the tokens; 0 is before the LLM.
        kept : (r, n) bool
            The visual tokens that each variant keeps.
        batch_size
            Variants per forward: more are faster and take more memory.

        Returns
        -------
        (r, vocabulary) float32
        """
        length = self.hidden[0].shape[1]
        stays = torch.ones(len(kept), length, dtype=torch.bool, device=kept.device)
        stays[:, self.visual] = kept
        counts, layers = stays.sum(1).tolist(), list(layers)
        # The first column that a variant has to run itself: the first dropped one, or the last one of the prompt, whose
        # output is the answer and which therefore always runs.
        first = torch.where(stays.all(1), length - 1, (~stays).long().argmax(1)).clamp(max=length - 1).tolist()
        self.cost.naive += sum(length * at + n * (self.layers - at) for at, n in zip(layers, counts, strict=True))
        out = self.logits.new_empty(len(kept), len(self.logits))
        # A batch has variants of one length only. Sorting by the first dropped column puts variants together that
        # share a long prefix; within a batch they are in the order in which they join.
        order = sorted(range(len(kept)), key=lambda r: (counts[r], first[r], layers[r]))
        while order:
            rows = [r for r in order[:batch_size] if counts[r] == counts[order[0]]]
            order = order[len(rows) :]
            rows.sort(key=layers.__getitem__)
            prefix = min(first[r] for r in rows)
            columns = torch.stack([stays[r].nonzero().flatten() for r in rows])[:, prefix:]
            with torch.inference_mode():
                out[rows] = self._continue([layers[r] for r in rows], columns, prefix)
        return out

    def _continue(self, joins: list[int], columns: Tensor, prefix: int) -> Tensor:
        """Logits (r, vocabulary) of variants sorted by layer, each with its columns (r, f) behind the shared prefix."""
        lm, f, family = decoder(self.model), columns.shape[1], models.family(self.model)
        now = self.hidden[0][0, :0].new_empty(0, f, self.hidden[0].shape[-1])
        mask = _causal_mask(f, prefix, now, lm.config._attn_implementation)
        for i, layer in enumerate(lm.layers):
            joined = sum(at <= i for at in joins)
            if not joined:
                continue
            now = torch.cat([now, self.hidden[i][0][columns[len(now) : joined]]])
            rotary = (x[0][columns[:joined]] for x in family.rotary(self.given[i]["position_embeddings"]))
            own = {
                "attention_mask": mask, "position_embeddings": family.rotary_given(*rotary), "position_ids": None,
                **dict.fromkeys(self.given[i].keys() & CACHE_NAMES, _Prefix(self.cache, prefix)),
            }  # fmt: skip
            for name in family.per_token:
                own[name] = self.given[i][name][0][columns[:joined]] if self.given[i].get(name) is not None else None
            out = layer(now, **self.given[i] | own)
            now = out[0] if isinstance(out, tuple) else out
            self.cost.processed += joined * f
        return self._head(now[:, -1])

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits (r, vocabulary) of what the last decoder layer puts out (r, width)."""
        logits: Tensor = self.model.get_output_embeddings()(decoder(self.model).norm(hidden))
        return logits.float()


def _check_shared(model: Model, inputs: Any) -> None:
    """Raise an UnsharedError unless in every layer each token attends to all before it and to none after it."""
    family, layers = models.family(model), decoder(model).layers
    attending = [layer for layer in layers if not models.is_recurrent(layer)]
    windows = [size for layer in attending if (size := window(layer) or chunk(layer)) is not None]
    straight = len(attending) == len(layers) and family.blocks(model, inputs) is None
    if not straight or (windows and min(windows) < inputs["input_ids"].shape[1]):
        raise UnsharedError(
            f"in {family.name} not every token attends to all before it and none after it: sweep with --metric "
            "generated"
        )


def _run_noting_layers(model: Model, inputs: Any) -> tuple[Any, list[Tensor], list[dict[str, Any]], Tensor]:
    """The model's output, the input and keyword arguments of each decoder layer, and the last layer's output."""
    layers = decoder(model).layers
    hidden: list[Tensor] = []
    given: list[dict[str, Any]] = []
    left: list[Tensor] = []

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if left and args[0] is not left[-1]:
            raise UnsharedError(
                "this model changes hidden states between its decoder layers, as deepstack does: sweep with "
                "--metric generated"
            )
        hidden.append(args[0])
        given.append(kwargs)

    def leave(_: Any, args: tuple[Any, ...], out: Any) -> None:
        left.append(out[0] if isinstance(out, tuple) else out)

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(leave).remove)
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    return out, hidden, given, left[-1]


class _Prefix:
    """A read-only view of a KV cache: every row sees its first `length` columns, and nothing is stored."""

    def __init__(self, cache: Any, length: int) -> None:
        self.cache, self.length = cache, length

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stored = self.cache.layers[layer]
        rows = [x[:, :, : self.length].expand(len(key), -1, -1, -1) for x in (stored.keys, stored.values)]
        return torch.cat([rows[0], key], dim=2), torch.cat([rows[1], value], dim=2)


def _causal_mask(queries: int, prefix: int, like: Tensor, attention: str) -> Tensor:
    """(1, 1, f, prefix + f): each query sees the whole prefix and is causal behind it; bool for sdpa, else additive."""
    seen = torch.ones(queries, prefix + queries, dtype=torch.bool, device=like.device).tril(prefix)[None, None]
    if attention == "sdpa":
        return seen
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, torch.finfo(like.dtype).min)
