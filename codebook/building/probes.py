"""The three probes of a visual token: what the LLM answers with it alone, and without it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from codebook import models
from codebook.errors import CodebookError

TOP_P1 = 50
"""Logits over which P1 is renormalised."""
TOP_JSD = 10
"""Logits over which two answers are compared: the top of the intact one."""


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


@dataclass(frozen=True)
class Prober:
    """Runs the LLM on visual tokens put into a prompt, one image at a time.

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
    batch_size
        Sequences in one forward.
    """

    model: Any
    prefix: Tensor
    suffix: Tensor
    pad: Tensor
    grid: tuple[int, int]
    batch_size: int = 16

    @classmethod
    def of(cls, model: Any, processor: Any, prompt: str, grid: tuple[int, int], batch_size: int = 16) -> Prober:
        """Put the prompt into the model's own chat template, and embed it."""
        if min(grid) < 3:
            raise CodebookError(f"a grid of {grid[0]} x {grid[1]} visual tokens is too small to probe: 3 x 3 is needed")
        if batch_size < 1:
            raise CodebookError(f"batch_size is {batch_size}: it must be at least 1")
        before, after = split_prompt(model, processor, prompt)
        config = model.config.get_text_config()
        pad = config.pad_token_id
        if pad is None:
            pad = processor.tokenizer.pad_token_id
        if pad is None:
            raise CodebookError("the model has no pad token to put in a token's place: set config.pad_token_id")
        embed, width = model.get_input_embeddings(), models.family(model).width(model)

        def vectors(ids: list[int]) -> Tensor:
            own = embed(torch.tensor(ids, dtype=torch.int64, device=model.device))
            return torch.nn.functional.pad(own, (0, width - own.shape[-1]))

        with torch.inference_mode():
            return cls(model, vectors(before)[None], vectors(after)[None], vectors([pad]), grid, batch_size)

    def answer(self, visual: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits of the first generated token.

        Parameters
        ----------
        visual : (b, n, width)
            One row a sequence: the visual tokens in the place of the image.
        grid
            Their rows and columns.

        Returns
        -------
        (b, vocabulary)
        """
        rows, family = [], models.family(self.model)
        for part in visual.split(self.batch_size):
            b = len(part)
            embeds = torch.cat([self.prefix.expand(b, -1, -1), part, self.suffix.expand(b, -1, -1)], dim=1)
            rows.append(family.answer(self.model, embeds, self.prefix.shape[1], grid).float())
        return torch.cat(rows)

    def alone(self, tokens: Tensor) -> Tensor:
        """P1 of each token when it is the whole image: tokens (m, d) -> (m,)."""
        return p1(self.answer(tokens[:, None], (1, 1)))

    def in_region(self, tokens: Tensor, chosen: list[int], form: str = "coded") -> Tensor:
        """JSD of removing each chosen token from its 3x3 region: all the image's tokens (n, d) -> (m,)."""
        regions = torch.tensor([region(i, self.grid) for i in chosen], device=tokens.device)
        intact = tokens[regions]
        removed = regions == torch.tensor(chosen, device=tokens.device)[:, None]
        ablated = torch.where(removed[..., None], self.pad, intact)
        return jsd(self.answer(intact, (3, 3)), self.answer(ablated, (3, 3)), form)

    def in_image(self, tokens: Tensor, chosen: list[int], form: str = "coded") -> Tensor:
        """JSD of removing the 3x3 region of each chosen token from the image: all tokens (n, d) -> (m,).

        What comes before a region does not see it: keys and values there are those of the intact pass. Regions are
        taken in the order of their first tokens, so that those in a batch share as much as they can, about half.
        Families whose prompts cannot share are passed whole.
        """
        if not models.family(self.model).shares:
            ablated = tokens.repeat(len(chosen), 1, 1)
            for row, i in enumerate(chosen):
                ablated[row, region(i, self.grid)] = self.pad
            intact = self.answer(tokens[None], self.grid).expand(len(chosen), -1)
            return jsd(intact, self.answer(ablated, self.grid), form)
        sequence = torch.cat([self.prefix, tokens[None], self.suffix], dim=1)
        out = self.model(inputs_embeds=sequence, use_cache=True, logits_to_keep=1)
        intact, cache, before = out.logits[:, -1].float(), out.past_key_values, self.prefix.shape[1]
        values = torch.empty(len(chosen), dtype=torch.float64, device=tokens.device)
        order = sorted(range(len(chosen)), key=lambda i: region(chosen[i], self.grid)[0], reverse=True)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            shared = before + region(chosen[part[-1]], self.grid)[0]  # the last of them has the first region
            if shared < (length := cache.get_seq_length()):  # for good, the order is descending
                cache.crop(shared - length)
            ablated = sequence[:, shared:].repeat(len(part), 1, 1)
            for row, i in enumerate(part):
                ablated[row, [before + t - shared for t in region(chosen[i], self.grid)]] = self.pad
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(part))
            out = self.model(inputs_embeds=ablated, past_key_values=own, use_cache=True, logits_to_keep=1)
            answers = out.logits[:, -1].float()
            values[part] = jsd(intact.expand(len(part), -1), answers, form)
        return values


def split_prompt(model: Any, processor: Any, prompt: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt before and after the image, as the processor makes them for `generate`."""
    if getattr(processor, "chat_template", None) is None:
        raise CodebookError("the processor has no chat template: set processor.chat_template to the model's own")
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    options = models.family(model).one_view
    inputs = processor(images=Image.new("RGB", (64, 64)), text=text, return_tensors="pt", **options)
    ids = inputs["input_ids"][0].tolist()
    image = model.config.image_token_id
    if image not in ids:
        raise CodebookError("the chat template puts no image into the prompt: use the model's own processor")
    end = len(ids) - ids[::-1].index(image)
    return ids[: ids.index(image)], ids[end:]
