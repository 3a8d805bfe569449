"""Questions about images as a model's inputs, and answers as the token ids behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image as Picture

from codebook.errors import CodebookError, counted, quoted
from codebook.inference.samples import Sample, check_asked
from codebook.models.base import Model, Processor, special_tokens
from codebook.models.chat import chat_text, check_text
from codebook.models.evaluating import check_evaluating
from codebook.models.generic import image_token
from codebook.models.wrappers import stock, unwrap
from codebook.store.pictures import read_image

CHARACTERS_PER_TOKEN = 64
"""Longest average token, far above that of any language: a longer question is refused before it is tokenized."""


class QuestionError(CodebookError):
    """A question that cannot be asked.

    Attributes
    ----------
    row
        Which one of a batch, counted from 0.
    """

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


def token_limit(model: Model, processor: Processor) -> int:
    """Most tokens of a prompt, visual ones included: the positions that the model knows, else the tokenizer's limit."""
    model = stock(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(positions or processor.tokenizer.model_max_length)


def check_question(model: Model, processor: Processor, question: str) -> None:
    """Refuse a question that cannot be asked, before anything is computed.

    Raises
    ------
    CodebookError
        If it is empty; else naming the model's limit, or the special token or unknown words in it.
    """
    check_asked(question)
    limit = token_limit(model, processor)
    if len(question) > limit * CHARACTERS_PER_TOKEN or len(question.split()) > limit:
        raise CodebookError(f"the question of {counted(len(question.split()), 'word')} is too long: {_at_most(limit)}")
    check_text(processor, question)


def check_samples(model: Model, processor: Processor, samples: Sequence[Sample]) -> None:
    """Refuse samples one of which cannot be asked, before any work is done.

    Raises
    ------
    QuestionError
        Naming the question.
    """
    for row, sample in enumerate(samples):
        try:
            for question in (*sample.earlier, sample.question):
                check_question(model, processor, question)
            check_text(processor, sample.answer or "", "answer")
        except CodebookError as error:
            shown = sample.question if len(sample.question) <= 60 else sample.question[:60] + "..."
            raise QuestionError(f"question {row + 1}, {shown!r}: {error}", row) from None


def _at_most(limit: int) -> str:
    return f"the model takes at most {limit} tokens, images included; shorten it"


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, ready for `generate`.

    Attributes
    ----------
    inputs
        The processor's output: one row per prompt, padded on the left, on the model's device and in its dtype.
    images
        How many images each prompt shows.
    """

    inputs: Any
    images: list[int]


def prepare(
    model: Model, processor: Processor, images: Sequence[Sequence[Picture.Image]], questions: Sequence[str]
) -> Prompts:
    """Process a batch of questions about images, as `ask` takes them, once for many answers.

    Parameters
    ----------
    images
        For each question its images, shown upright and as RGB.
    questions
        In plain words.

    Raises
    ------
    QuestionError
        If a question cannot be asked; its `row` says which.
    """
    model = unwrap(model)
    _check_given(processor, images, questions)
    theirs, own = getattr(processor, "image_token_id", None), image_token(model.config)
    if theirs not in (None, own):
        raise CodebookError(
            f"the processor marks images by token {theirs} and the model by {own}: give the model's own processor"
        )
    for row, question in enumerate(questions):
        try:
            check_question(model, processor, question)
        except CodebookError as error:
            raise QuestionError(str(error), row) from None
    texts = [chat_text(processor, question, len(own)) for own, question in zip(images, questions, strict=True)]
    return encode_prompts(model, processor, images, texts)


def check_new_tokens(count: int) -> None:
    """Raise a CodebookError unless an answer can have at most so many tokens."""
    if not isinstance(count, int) or count < 1:
        raise CodebookError(f"max_new_tokens is {quoted(count)}: give a whole number, 1 or more")


def check_texts(questions: object) -> None:
    """Raise a CodebookError unless these are questions: a list of texts, one at least."""
    if not isinstance(questions, list | tuple) or not all(isinstance(question, str) for question in questions):
        raise CodebookError(f"questions are a list of texts, not {quoted(questions)}: write [question]")
    if not questions:
        raise CodebookError("there is no question: give at least one")


def _check_given(processor: object, images: object, questions: Sequence[str]) -> None:
    """Raise a CodebookError unless these are a processor, and questions each with a list of images."""
    if getattr(processor, "tokenizer", None) is None or not hasattr(processor, "apply_chat_template"):
        raise CodebookError(
            f"the model's processor is needed, not a {type(processor).__name__}: model, processor = codebook.load(...)"
        )
    check_texts(questions)
    if not isinstance(images, list | tuple) or not all(isinstance(own, list | tuple) for own in images):
        raise CodebookError(f"images are a list with a list for each question, not {quoted(images)}: write [[image]]")
    if len(images) != len(questions):
        asked, lists = counted(len(questions), "question"), counted(len(images), "list")
        raise CodebookError(f"{asked} cannot have {lists} of images: give each its own")


def encode_prompts(
    model: Model, processor: Processor, images: Sequence[Sequence[Picture.Image]], texts: Sequence[str]
) -> Prompts:
    """Process a batch of prompts that the chat template has made, each with its images.

    Raises
    ------
    QuestionError
        If an image cannot be read, or a prompt is longer than the model's positions; its `row` says which.
    CodebookError
        If the model is in training mode, and that changes its answers.
    """
    check_evaluating(model)
    shown = [_upright(row, own) for row, own in enumerate(images)] if any(images) else None
    options = special_tokens(processor, texts[0])  # of one template
    inputs = processor(images=shown, text=texts, padding=True, padding_side="left", return_tensors="pt", **options)
    limit = token_limit(model, processor)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        if length > limit:
            raise QuestionError(f"the question is too long, a prompt of {length} tokens: {_at_most(limit)}", row)
    return Prompts(inputs.to(model.device, model.dtype), [len(own) for own in images])


def _upright(row: int, pictures: Sequence[Picture.Image]) -> list[Picture.Image]:
    """The pictures of a question as people see them, also those that the caller has opened."""
    for picture in pictures:
        if not isinstance(picture, Picture.Image):
            raise QuestionError(
                f"an image of question {row + 1} is a {type(picture).__name__}: open files by PIL.Image.open, make "
                "arrays pictures by PIL.Image.fromarray",
                row,
            )
    try:
        return [read_image(picture, f"of question {row + 1}") for picture in pictures]
    except CodebookError as error:
        raise QuestionError(str(error), row) from None


def prepare_samples(model: Model, processor: Processor, samples: Sequence[Sample]) -> Prompts:
    """Process a batch of samples; their answers play no part in it."""
    return prepare(model, processor, [sample.pictures() for sample in samples], [sample.question for sample in samples])


def text_length(processor: Processor, sample: Sample) -> int:
    """Token count of a sample's prompt before its images are expanded into visual tokens."""
    text = chat_text(processor, sample.question, len(sample.images))
    return len(processor.tokenizer(text, **special_tokens(processor, text))["input_ids"])


def answer_ids(processor: Processor, sample: Sample) -> list[int]:
    """Token ids of a sample's answer where the chat template puts it, without the end of the turn.

    Raises
    ------
    CodebookError
        If the answer has no token, or holds a special one.
    """
    assert sample.answer is not None
    answer, tokenizer, count = sample.answer.strip(), processor.tokenizer, len(sample.images)
    prompt = chat_text(processor, sample.question, count)
    whole = chat_text(processor, sample.question, count, answer)
    # A template that shows an answered turn in another way says nothing about where the answer begins.
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if answer and whole.startswith(prompt) and answer in whole[len(prompt) :]:
        before = tokenizer(prompt)["input_ids"]
        after = tokenizer(whole[: whole.rindex(answer) + len(answer)])["input_ids"]
        if after[: len(before)] == before:
            ids = after[len(before) :]
    if not ids:
        raise CodebookError(f"the answer {sample.answer!r} to {sample.question!r} has no tokens: leave it out")
    return list(ids)
