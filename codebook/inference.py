"""Asking a model about images, pruned or not: what `codebook prune` and the demo run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Picture
from PIL import ImageSequence

from codebook.errors import CodebookError
from codebook.models import Image
from codebook.pruning import Schedule

FRAMES = 8
"""Of a video that are shown."""


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


def read_image(path: Path | str) -> Picture.Image:
    """Read a picture as RGB, or raise a CodebookError that says why it cannot be read."""
    try:
        with Picture.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise CodebookError(f"no such image: {path}") from None
    except (OSError, SyntaxError, ValueError, Picture.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "").strip(" '") or type(error).__name__
        raise CodebookError(f"cannot read image {path}: {reason}; use a whole PNG, JPEG or WebP file") from None


def read_video(path: Path, frames: int = FRAMES) -> tuple[Path | Picture.Image, ...]:
    """Up to `frames` frames, evenly spaced, of a folder of them (in order of their names) or an animated picture."""
    if path.is_dir():
        found: list[Path | Picture.Image] = [*sorted(file for file in path.iterdir() if not file.name.startswith("."))]
    else:
        try:
            with Picture.open(path) as picture:
                found = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
        except (OSError, SyntaxError, ValueError, Picture.DecompressionBombError):
            raise CodebookError(
                f"cannot read video {path}: give a folder of frames, or an animated GIF, PNG or WebP file"
            ) from None
    if not found:
        raise CodebookError(f"{path} holds no frames: give a folder of pictures")
    count = min(frames, len(found))
    return tuple(found[(2 * i + 1) * len(found) // (2 * count)] for i in range(count))


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


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, ready for `generate`, and how many images each shows."""

    inputs: Any
    images: list[int]


def prepare(model: Any, processor: Any, images: Sequence[Sequence[Picture.Image]], questions: Sequence[str]) -> Prompts:
    """Process a batch of questions about images, as `ask` takes them, once for many answers."""
    if processor.chat_template is None:
        raise CodebookError("the processor has no chat template: set processor.chat_template to the model's own")
    texts = [
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [*[{"type": "image"}] * len(own), {"type": "text", "text": question}],
                }
            ],
            add_generation_prompt=True,
        )
        for own, question in zip(images, questions, strict=True)
    ]
    shown = [list(own) for own in images] if any(images) else None
    inputs = processor(images=shown, text=texts, padding=True, padding_side="left", return_tensors="pt")
    return Prompts(inputs.to(model.device, model.dtype), [len(own) for own in images])


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
