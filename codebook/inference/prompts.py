"""Prompts and answers as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image as Picture

from codebook.errors import CodebookError
from codebook.inference.samples import Sample


def encode(model: Any, processor: Any, samples: Sequence[Sample]) -> Any:
    """The model's inputs for samples, one row a sample, padded on the left, on its device and in its dtype."""
    if getattr(processor, "chat_template", None) is None:
        raise CodebookError("the processor has no chat template: set processor.chat_template to the model's own")
    texts = [processor.apply_chat_template(s.messages(), add_generation_prompt=True) for s in samples]
    pictures = [picture for sample in samples for picture in sample.pictures()]
    inputs = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    return inputs.to(model.device, model.dtype)


def answer_ids(processor: Any, sample: Sample) -> list[int]:
    """Token ids of a sample's answer where the chat template puts it, without the end of the turn.

    Raises
    ------
    CodebookError
        If the answer has no token.
    """
    assert sample.answer is not None
    answer, tokenizer = sample.answer.strip(), processor.tokenizer
    prompt = processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    whole = processor.apply_chat_template([*sample.messages(), turn])
    # A template that shows an answered turn in another way says nothing about where the answer begins.
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if answer and whole.startswith(prompt) and answer in whole[len(prompt) :]:
        before = tokenizer(prompt)["input_ids"]
        after = tokenizer(whole[: whole.rindex(answer) + len(answer)])["input_ids"]
        if after[: len(before)] == before:
            ids = after[len(before) :]
    if not ids:
        raise CodebookError(f"the answer {sample.answer!r} to {sample.question!r} has no tokens: leave it out")
    return ids


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
