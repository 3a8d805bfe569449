"""Asking a model about images, pruned or not."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image as Picture
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from codebook.errors import CodebookError
from codebook.inference.outputs import NanWatch
from codebook.inference.overlay import overlay, shown_part, stacked
from codebook.inference.padding import without_padding
from codebook.inference.prompts import Prompts, check_new_tokens, prepare
from codebook.models import Image, family, unwrap
from codebook.models.base import Model, Processor
from codebook.pruning import Schedule
from codebook.pruning.engine.context import Pruning, in_force
from codebook.store.pictures import upright_rgb

ONE_SEQUENCE = {
    "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "remove_invalid_values": False,
}  # fmt: skip
"""Arguments of `generate` for one row of tokens per prompt, whatever the model's `generation_config` says.

Values that are no numbers are not replaced, which would hide them from `NanWatch`.
"""


@dataclass(frozen=True)
class Answer:
    """An answer, and which visual tokens were kept for it.

    Attributes
    ----------
    text
        The answer, without special tokens.
    kept
        For each image of the question the visual tokens kept to the end, as indices into the image's tokens.
    images
        For each image where its tokens are and how they are laid out.
    counts
        For each image its number of visual tokens, then the number left after each stage.
    stages
        For each image the tokens left after each stage.
    pictures
        For each image the part of it that the model was shown. In a notebook an answer is displayed as `overlay`.
    """

    text: str
    kept: list[list[int]]
    images: list[Image]
    counts: list[list[int]]
    stages: list[list[list[int]]] = field(default_factory=list)
    pictures: list[Picture.Image] = field(default_factory=list)

    def __repr__(self) -> str:
        tokens, kept = sum(own[0] for own in self.counts), sum(own[-1] for own in self.counts)
        return f"<Answer {self.text!r} from {kept} of {tokens} visual tokens>"

    def overlay(self) -> Picture.Image:
        """The pictures, each beside itself with dropped tokens darkened and kept ones framed, one below the other.

        Raises
        ------
        CodebookError
            If the answer has no pictures.
        """
        if not self.pictures:
            raise CodebookError("this answer has no pictures to draw on: ask about at least one")
        shown = zip(self.pictures, self.images, self.kept, strict=True)
        return stacked([overlay(picture, *image.view(kept)) for picture, image, kept in shown])

    def _repr_png_(self) -> bytes | None:
        if not self.pictures:
            return None
        file = io.BytesIO()
        self.overlay().save(file, "PNG")
        return file.getvalue()


def ask(
    model: Model,
    processor: Processor,
    images: Sequence[Sequence[Picture.Image]],
    questions: Sequence[str],
    schedule: Schedule | None = None,
    max_new_tokens: int = 32,
) -> list[Answer]:
    """Answer a batch of questions, each about its own images, greedily.

    Parameters
    ----------
    model, processor
        As `codebook.load` returns them, or any supported model of transformers' own and its processor.
    images
        For each question its images, shown before the question in this order.
    questions
        In plain words: the model's own chat template is applied.
    schedule
        What to prune. None leaves the model as it is: unpruned, unless it is enabled or inside a context.
        `Schedule([])` prunes nothing even there.
    max_new_tokens
        Most tokens per answer.

    Returns
    -------
    One Answer per question, in their order

    Raises
    ------
    QuestionError
        If a question cannot be asked; its `row` says which.
    CodebookError
        If the model's outputs are NaN, or it is in training mode and that changes them.
    """
    model = unwrap(model)
    check_new_tokens(max_new_tokens)
    answers = answer_prompts(model, processor, prepare(model, processor, images, questions), schedule, max_new_tokens)
    return [
        replace(answer, pictures=[_drawable(model, processor, picture) for picture in own])
        for answer, own in zip(answers, images, strict=True)
    ]


def _drawable(model: Model, processor: Processor, picture: Picture.Image) -> Picture.Image:
    """The part of a picture that its whole view shows, upright."""
    upright = upright_rgb(picture)
    return shown_part(upright, family(model).shown_box(processor, upright.size))


def answer_prompts(
    model: Model, processor: Processor, prompts: Prompts, schedule: Schedule | None = None, max_new_tokens: int = 32
) -> list[Answer]:
    """Answer prepared prompts greedily under a schedule, as `ask` takes it.

    Raises
    ------
    CodebookError
        If the model's outputs are NaN.
    """
    generated = generate(model, prompts, schedule, max_new_tokens=max_new_tokens, do_sample=False)
    texts = processor.batch_decode(generated.tokens, skip_special_tokens=True)
    return [answer_of(text.strip(), shown) for text, shown in zip(texts, generated.shown, strict=True)]


def answer_of(text: str, shown: Sequence[tuple[Image, list[Tensor]]]) -> Answer:
    """The answer of this text about these images, each with the tokens (int64) that survived each stage."""
    kept = [stages[-1].tolist() if stages else list(range(image.count)) for image, stages in shown]
    counts = [[image.count, *map(len, stages)] for image, stages in shown]
    left = [[stage.tolist() for stage in stages] for _, stages in shown]
    return Answer(text, kept, [image for image, _ in shown], counts, left)


@dataclass(frozen=True)
class Generated:
    """What a model generated for a batch of prompts.

    Attributes
    ----------
    tokens
        (B, n) int64: the new tokens; rows that ended early are padded.
    shown
        For each prompt its images, each with the tokens (int64) that survived each stage.
    """

    tokens: Tensor
    shown: list[list[tuple[Image, list[Tensor]]]]


def generate(
    model: Model,
    prompts: Prompts,
    schedule: Schedule | None = None,
    processors: Sequence[LogitsProcessor] = (),
    **options: Any,
) -> Generated:
    """Run the model's own `generate` on prepared prompts under a schedule, as `ask` takes it: each as alone.

    Parameters
    ----------
    processors
        Logits processors, which see the outputs after the check that these are numbers.
    options
        Other arguments of `generate`.

    Raises
    ------
    CodebookError
        If the model's outputs are NaN.
    """
    watch = NanWatch()
    with torch.inference_mode(), _context(model, schedule) as pruning:
        readers, off = without_padding(model, prompts.inputs, options)
        options = ONE_SEQUENCE | options | off
        steps = LogitsProcessorList([watch, *readers, *processors])
        out = model.generate(**prompts.inputs, logits_processor=steps, **options)
    watch.check()
    # Pruning lists the images of the whole batch, prompt by prompt.
    every_image = iter(zip(pruning.images, pruning.kept, strict=True))
    shown = [[next(every_image) for _ in range(count)] for count in prompts.images]
    return Generated(out[:, prompts.inputs["input_ids"].shape[1] :], shown)


def _context(model: Model, schedule: Schedule | None) -> contextlib.AbstractContextManager[Pruning]:
    """What prunes the calls of this thread: the schedule's own context, or the one that they are in already."""
    if schedule is None and (own := in_force(model)) is not None:
        return contextlib.nullcontext(own)
    return Schedule.of(schedule)(model, "thread")
