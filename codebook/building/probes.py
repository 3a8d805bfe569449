"""The three probes of a visual token: what the LLM answers with it alone, and without it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from codebook import models
from codebook.errors import CodebookError, out_of_memory
from codebook.models import Model, Processor
from codebook.models.base import decoder, special_tokens
from codebook.models.chat import chat_text
from codebook.models.finite import check_logits
from codebook.models.layout import token_runs

TOP_P1 = 50
"""Logits over which P1 is renormalised."""
TOP_JSD = 10
"""Logits over which two answers are compared: the top of the intact one."""
TOKENS_PER_PASS = {"cpu": 1024}
"""Tokens per forward pass when no batch size is given, by device; on the CPU larger passes were slower."""
TOKENS_PER_PASS_ELSEWHERE = 16384


def p1(logits: Tensor) -> Tensor:
    """Confidence of the answer to one token alone: the top softmax probability, over the top 50 logits.

    Parameters
    ----------
    logits : (b, vocabulary)

    Returns
    -------
    (b,) float64
    """
    return logits.double().topk(min(TOP_P1, logits.shape[-1]), dim=-1).values.softmax(dim=-1)[..., 0]


def jsd(intact: Tensor, ablated: Tensor, form: str = "coded") -> Tensor:
    """Jensen-Shannon divergence between two answers, over the top 10 tokens of the intact one.

    Parameters
    ----------
    intact, ablated : (b, vocabulary)
    form
        `coded`, as in the authors' code: `1/2 (mean m log(m/p) + mean m log(m/q))`, the reverse direction and a
        mean over the ten. `textbook`: `1/2 (sum p log(p/m) + sum q log(q/m))`. Both in nats.

    Returns
    -------
    (b,) float64, at least 0
    """
    top = intact.topk(min(TOP_JSD, intact.shape[-1]), dim=-1).indices
    p = intact.gather(-1, top).double().log_softmax(dim=-1)
    q = ablated.gather(-1, top).double().log_softmax(dim=-1)
    m = torch.logaddexp(p, q) - math.log(2)
    if form == "coded":
        value = (m.exp() * (m - p)).mean(dim=-1) + (m.exp() * (m - q)).mean(dim=-1)
    else:
        value = (p.exp() * (p - m)).sum(dim=-1) + (q.exp() * (q - m)).sum(dim=-1)
    return (value / 2).clamp(min=0)  # rounding


def region(token: int, grid: tuple[int, int]) -> list[int]:
    """The nine tokens of the 3x3 region around a token, in raster order, shifted inward at the borders."""
    rows, cols = grid
    top = min(max(token // cols - 1, 0), rows - 3)
    left = min(max(token % cols - 1, 0), cols - 3)
    return [(top + i) * cols + left + j for i in range(3) for j in range(3)]


@dataclass
class Prober:
    """Runs the LLM on visual tokens put into a prompt, one image at a time.

    What sequences have in common is computed once: the keys and values of the prompt before the image in a build, and
    those of an image before a removed region in an image. `codebook.building.cascade` says what a last bit that
    differs between batches may do.

    Attributes
    ----------
    model
        A stock model, in eval mode.
    prefix, suffix : (1, a, width), (1, b, width)
        Embeddings of the prompt before and after the visual tokens.
    pad : (1, width)
        Embedding that takes a removed token's place.
    grid
        Rows and columns of the visual tokens.
    row_end : (1, c, width) or None
        Embeddings of the tokens of text that stand between two rows of visual tokens, where there are any.
    batch_size
        Most sequences per forward pass; None: as many as make up `TOKENS_PER_PASS`. Halved when memory runs out.
    whole
        Compute every sequence of every token from its first position to its last, as the published code does.
    """

    model: Model
    prefix: Tensor
    suffix: Tensor
    pad: Tensor
    grid: tuple[int, int]
    batch_size: int | None = None
    whole: bool = False
    row_end: Tensor | None = None
    _most: int = field(default=sys.maxsize, init=False, repr=False)  # tokens that a forward pass has memory for
    _prompt: Any = field(default=None, init=False, repr=False)

    @classmethod
    def of(
        cls,
        model: Model,
        processor: Processor,
        prompt: str,
        grid: tuple[int, int],
        batch_size: int | None = None,
        pad: int | None = None,
    ) -> Prober:
        """Put the prompt into the model's own chat template, and embed it; `pad` as in `Settings`."""
        model = models.unwrap(model)
        if min(grid) < 3:
            raise CodebookError(f"a grid of {grid[0]} x {grid[1]} visual tokens is too small to probe: 3 x 3 is needed")
        if batch_size is not None and batch_size < 1:
            raise CodebookError(f"batch_size is {batch_size}: it must be at least 1")
        before, row_end, after = split_prompt(model, processor, prompt)
        pad = pad_token(model, processor, pad)
        family = models.family(model)
        width = family.width(model)

        def vectors(ids: list[int]) -> Tensor:
            own = family.words(model, torch.tensor(ids, dtype=torch.int64, device=model.device))
            return torch.nn.functional.pad(own, (0, width - own.shape[-1]))

        with torch.inference_mode():
            ends = vectors(row_end)[None] if row_end else None
            text = vectors(before)[None], vectors(after)[None]
            return cls(model, *text, vectors([pad]), grid, batch_size, row_end=ends)

    def one_by_one(self) -> Prober:
        """The same probes, each in a forward pass of its own: values that no batch and no sharing has touched."""
        return replace(self, batch_size=1, whole=True)

    def answer(self, visual: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits of the first generated token.

        Parameters
        ----------
        visual : (b, n, width)
            For each sequence the visual tokens in the place of the image.
        grid
            Their rows and columns.

        Returns
        -------
        (b, vocabulary) float32
        """
        visual = self._with_row_ends(visual, grid)
        shared = self.prefix.shape[1]
        if self._prompt is None and shared and self.shares:
            self._prompt = self.model(inputs_embeds=self.prefix, use_cache=True, logits_to_keep=1).past_key_values
        prefix = self.prefix if self._prompt is None else self.prefix[:, :0]

        def run(start: int, stop: int) -> Tensor:
            parts = (prefix.expand(stop - start, -1, -1), visual[start:stop], self.suffix.expand(stop - start, -1, -1))
            return self._logits(torch.cat(parts, dim=1), grid, self._prompt, shared)

        return self._batches(len(visual), shared + visual.shape[1] + self.suffix.shape[1], run)

    def alone(self, tokens: Tensor) -> Tensor:
        """P1 of each token when it is the whole image: tokens (m, d) -> (m,)."""
        return p1(self.answer(tokens[:, None], (1, 1)))

    def in_region(self, tokens: Tensor, chosen: list[int], form: str = "coded") -> Tensor:
        """JSD of removing each chosen token from its 3x3 region: all the image's tokens (n, d) -> (m,)."""
        device = tokens.device
        places = torch.tensor([region(i, self.grid) for i in chosen], device=device)
        distinct, which = places, torch.arange(len(places), device=device)
        if not self.whole:  # at the borders tokens have the same region
            distinct, which = places.unique(dim=0, return_inverse=True)
        removed = places == torch.tensor(chosen, device=device)[:, None]
        ablated = torch.where(removed[..., None], self.pad, tokens[places])
        answers = self.answer(torch.cat([tokens[distinct], ablated]), (3, 3))
        return jsd(answers[: len(distinct)][which], answers[len(distinct) :], form)

    def in_image(self, tokens: Tensor, chosen: list[int], form: str = "coded") -> Tensor:
        """JSD of removing the 3x3 region of each chosen token from the image: all tokens (n, d) -> (m,).

        What comes before a region does not see it: keys and values there are those of the intact pass. Regions are
        taken in the order of their first tokens, so that those in a batch share as much as they can, about half.
        Families whose prompts cannot share are passed whole.
        """
        sequence = torch.cat([self.prefix, self._with_row_ends(tokens[None], self.grid), self.suffix], dim=1)
        before, length = self.prefix.shape[1], sequence.shape[1]
        every = [tuple(region(i, self.grid)) for i in chosen]
        places = every if self.whole else sorted(set(every))
        cache: Any = None

        def intact(start: int, stop: int) -> Tensor:
            nonlocal cache
            if not self.shares:
                return self._logits(sequence, self.grid)
            out = self.model(inputs_embeds=sequence, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            return out.logits[:, -1].float()

        def without(start: int, stop: int) -> Tensor:
            shared = 0 if cache is None else before + self._column(places[start][0])
            ablated = sequence[:, shared:].repeat(stop - start, 1, 1)
            for row, place in zip(ablated, places[start:stop], strict=True):
                row[[before + self._column(token) - shared for token in place]] = self.pad
            return self._logits(ablated, self.grid, cache, shared)

        answer = self._batches(1, length, intact)
        divergence = jsd(answer.expand(len(places), -1), self._batches(len(places), length, without), form)
        if self.whole:
            return divergence
        row_of = {place: row for row, place in enumerate(places)}
        return divergence[[row_of[place] for place in every]]

    def _with_row_ends(self, visual: Tensor, grid: tuple[int, int]) -> Tensor:
        """Visual tokens (b, n, width) as they stand in the prompt."""
        if self.row_end is None:
            return visual
        ends = self.row_end.expand(len(visual) * grid[0], -1, -1)
        lines = torch.cat([visual.reshape(len(ends), grid[1], -1), ends], dim=1)
        return lines.view(len(visual), -1, lines.shape[-1])[:, : -ends.shape[1]]

    def _column(self, token: int) -> int:
        """How far a token of the whole image is from the first."""
        return token + (0 if self.row_end is None else token // self.grid[1] * self.row_end.shape[1])

    @property
    def shares(self) -> bool:
        """Whether sequences share keys and values: what has left a sliding window, a cache has forgotten."""
        layers = decoder(self.model).layers
        if self.whole or not self.family.reusable_prefix or any(map(models.is_recurrent, layers)):
            return False
        rows, cols = self.grid
        length = self.prefix.shape[1] + self._column(rows * cols) + self.suffix.shape[1]
        cached = DynamicCache(config=self.model.config.get_text_config()).layers
        return not any(
            isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window <= length for layer in cached
        )

    @property
    def family(self) -> models.Family:
        return models.family(self.model)

    def _logits(self, embeds: Tensor, grid: tuple[int, int], cache: Any = None, shared: int = 0) -> Tensor:
        """Last logits (b, vocabulary) of sequences (b, n, width) that follow `shared` positions of a cache."""
        if cache is None or not shared:
            return self.family.answer(self.model, embeds, self.prefix.shape[1], grid).float()
        held = [(layer.keys[..., :shared, :], layer.values[..., :shared, :]) for layer in cache.layers]
        past = DynamicCache([tuple(t.expand(len(embeds), -1, -1, -1) for t in pair) for pair in held])
        out = self.model(inputs_embeds=embeds, past_key_values=past, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float()

    def _batches(self, count: int, length: int, run: Callable[[int, int], Tensor]) -> Tensor:
        """`run(start, stop)` over `count` sequences of a length, as many at once as memory holds."""
        rows: list[Tensor] = []
        done = 0
        while done < count:
            usual = TOKENS_PER_PASS.get(self.prefix.device.type, TOKENS_PER_PASS_ELSEWHERE)
            most = min(self.batch_size or max(1, usual // length), max(1, self._most // length))
            stop = min(count, done + most)
            try:
                rows.append(run(done, stop))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if stop - done == 1:
                    raise CodebookError(
                        f"out of memory with one sequence of {length} tokens on {self.model.device}: take a smaller "
                        "--dtype or another device and run again, finished images are kept"
                    ) from None
                self._most = (stop - done) // 2 * length
            else:
                done = stop
                continue
            # outside of the handler, where the error no longer holds on to the tensors of the failed forward
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        logits = torch.cat(rows)
        check_logits(logits)  # NaN is below no threshold: it would read as an image without redundant tokens
        return logits


def pad_token(model: Model, processor: Processor, chosen: int | None = None) -> int:
    """The token id whose word embedding takes the place of a removed visual token.

    The one that is chosen; else the pad token of the model's config, or of its tokenizer. A model without one gets the
    token whose word embedding is the shortest: it adds the least.
    """
    embeddings = model.get_input_embeddings().weight
    if chosen is not None:
        if chosen >= len(embeddings):
            raise CodebookError(f"pad is {chosen}: this model's token ids end at {len(embeddings) - 1}")
        return chosen
    for own in (model.config.get_text_config().pad_token_id, processor.tokenizer.pad_token_id):
        if own is not None and 0 <= own < len(embeddings):
            return int(own)
    return int(embeddings.detach().float().norm(dim=1).argmin())


def split_prompt(model: Model, processor: Processor, prompt: str) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the prompt before the image, between its rows and after it, as the processor makes them."""
    text = chat_text(processor, prompt)
    family = models.family(model)
    options = family.one_view | special_tokens(processor, text)
    inputs = processor(images=Image.new("RGB", (64, 64)), text=text, return_tensors="pt", **options)
    ids, image = inputs["input_ids"][0].tolist(), model.config.image_token_id
    if image not in ids:
        raise CodebookError("the chat template puts no image into the prompt: use the model's own processor")
    ids = family.without_crops(model, ids)
    found = token_runs(ids, image)
    gaps = [ids[start + length : after] for (start, length), (after, _) in pairwise(found)]
    if any(gap != gaps[0] for gap in gaps):
        raise CodebookError("the processor puts text into the image that is not the same after every row")
    return ids[: found[0][0]], gaps[0] if gaps else [], ids[sum(found[-1]) :]
