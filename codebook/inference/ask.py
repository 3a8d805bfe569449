"""Asking a model about images, pruned or not: what `codebook prune` and the demo run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image as Picture

from codebook.inference.prompts import Prompts, prepare
from codebook.models import Image
from codebook.pruning import Schedule


@dataclass(frozen=True)
class Answer:
    """An answer, and for each of its question's images what was kept.

    Attributes
    ----------
    kept
        The visual tokens kept to the end, by places in the image.
    counts
        How many there were, and were left after each stage.
    """

    text: str
    kept: list[list[int]]
    images: list[Image]
    counts: list[list[int]]


def ask(
    model: Any,
    processor: Any,
    images: Sequence[Sequence[Picture.Image]],
    questions: Sequence[str],
    schedule: Schedule | None = None,
    max_new_tokens: int = 32,
) -> list[Answer]:
    """Answer a batch of questions, each about its own images, greedily.

    Parameters
    ----------
    images
        For each question its images, shown before the question in this order.
    questions
        In plain words: the model's own chat template is applied.
    schedule
        None leaves the model as it is.

    Returns
    -------
    list[Answer], one a question
    """
    return answer(model, processor, prepare(model, processor, images, questions), schedule, max_new_tokens)


def answer(
    model: Any, processor: Any, prompts: Prompts, schedule: Schedule | None = None, max_new_tokens: int = 32
) -> list[Answer]:
    """Answer prepared prompts greedily under a schedule; None leaves the model as it is."""
    with torch.inference_mode(), (schedule or Schedule([]))(model) as pruning:
        out = model.generate(**prompts.inputs, max_new_tokens=max_new_tokens, do_sample=False)
    words = processor.batch_decode(out[:, prompts.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found = iter(zip(pruning.images, pruning.kept, strict=True))
    answers = []
    for text, count in zip(words, prompts.images, strict=True):
        own = [next(found) for _ in range(count)]
        kept = [stages[-1].tolist() if stages else list(range(image.count)) for image, stages in own]
        counts = [[image.count, *map(len, stages)] for image, stages in own]
        answers.append(Answer(text.strip(), kept, [image for image, _ in own], counts))
    return answers
