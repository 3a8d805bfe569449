"""Later questions about an image that the first question has pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image as Picture
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from codebook.errors import CodebookError
from codebook.inference.ask import ONE_SEQUENCE, Answer, answer_of, ask
from codebook.inference.outputs import NanWatch
from codebook.inference.prompts import check_new_tokens, check_question, check_texts, prepare
from codebook.inference.samples import Sample
from codebook.models import family, unwrap
from codebook.models.base import Model, Processor
from codebook.models.chat import next_turn
from codebook.pruning import Schedule


def answer_sample(
    model: Model, processor: Processor, sample: Sample, schedule: Schedule | None = None, max_new_tokens: int = 32
) -> Answer:
    """The answer to a sample's question, greedily, after its earlier questions if there are any.

    Raises
    ------
    QuestionError, CodebookError
        As `ask` and `converse` raise them.
    """
    pictures = sample.pictures()
    if not sample.earlier:
        return ask(model, processor, [pictures], [sample.question], schedule, max_new_tokens)[0]
    # The first of fresh questions alone leaves something: what it kept of the images.
    questions = [*(sample.earlier[:1] if sample.fresh else sample.earlier), sample.question]
    return converse(model, processor, pictures, questions, schedule, max_new_tokens, fresh=sample.fresh)[-1]


def converse(
    model: Model,
    processor: Processor,
    images: Sequence[Picture.Image],
    questions: Sequence[str],
    schedule: Schedule | None = None,
    max_new_tokens: int = 32,
    *,
    fresh: bool = False,
) -> list[Answer]:
    """Ask several questions about the same images, one after the other, on one KV cache.

    The images are encoded and pruned once, at the first question: methods that look at the question see that one. A
    later question is read on top of the cache, without the images.

    Parameters
    ----------
    questions
        In plain words; the model's own chat template joins them.
    schedule
        What to prune; None prunes nothing.
    max_new_tokens
        Most tokens per answer.
    fresh
        Take each question and answer off the cache again, down to the images: the next question sees nothing of them
        but what they left of the images, as where a server keeps an image's cache for further questions.

    Returns
    -------
    One Answer per question, in their order; `kept` and what belongs to it is that of the first in all of them

    Raises
    ------
    CodebookError
        If the chat template shows no earlier answers, the model's cache cannot be shortened (`fresh`), or its outputs
        are NaN.
    """
    model, schedule = unwrap(model), Schedule.of(schedule)
    check_texts(questions)
    check_new_tokens(max_new_tokens)
    if fresh and not family(model).reusable_prefix:
        raise CodebookError(
            f"{family(model).name} cannot keep what it has read of an image for another question: ask in one "
            "conversation, without `fresh`"
        )
    for question in questions:
        check_question(model, processor, question)
    prompts = [prepare(model, processor, [images], [own]).inputs for own in questions[: None if fresh else 1]]
    given, texts, watch = prompts[0], [], NanWatch()
    length = ONE_SEQUENCE | {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    with torch.inference_mode(), schedule(model, "thread") as pruning:
        for turn in range(len(questions)):
            out = model.generate(**given, logits_processor=LogitsProcessorList([watch]), **length)
            prompt = given["input_ids"].shape[1]
            texts.append(processor.batch_decode(out.sequences[:, prompt:], skip_special_tokens=True)[0].strip())
            if turn + 1 == len(questions):
                break
            if fresh:
                ids = prompts[turn + 1]["input_ids"]
                shorten_cache(out.past_key_values, common_start(model, given["input_ids"], ids))
            else:
                spoken = _without_end(out.sequences, prompt, model.generation_config.eos_token_id)
                added = next_turn(processor, questions[0], len(images), questions[turn + 1])
                ids = torch.cat([spoken, torch.tensor([added], device=spoken.device)], 1)
            cache = out.past_key_values
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
    watch.check()
    shown = list(zip(pruning.images, pruning.kept, strict=True))
    return [answer_of(text, shown) for text in texts]


def common_start(model: Model, ids: Tensor, other: Tensor) -> int:
    """How many tokens two prompts about the same images have in common at their start; all of the images' are."""
    length = min(ids.shape[1], other.shape[1] - 1)  # something is left to read
    same = (ids[0, :length] == other[0, :length]).long().cumprod(0)
    count = int(same.sum())
    if (other[0, count:] == family(model).token(model, "image")).any():
        raise CodebookError("the chat template puts the question before its images: ask in one conversation")
    return count


def shorten_cache(cache: Any, count: int) -> None:
    """Take all but the first tokens off a KV cache."""
    if not all(
        isinstance(one, DynamicLayer) and not isinstance(one, DynamicSlidingWindowLayer) for one in cache.layers
    ):
        raise CodebookError(
            "this model's cache forgets what it has read, so it cannot be taken back to the images: ask in one "
            "conversation, without `fresh`"
        )
    if added := cache.get_seq_length() - count:
        cache.crop(-added)


def _without_end(sequences: Tensor, start: int, ends: int | list[int] | None) -> Tensor:
    """The sequence so far without the tokens that ended the answer: the chat template writes them again."""
    known = set(ends) if isinstance(ends, list) else {ends}
    stop = sequences.shape[1]
    while stop > start and int(sequences[0, stop - 1]) in known:
        stop -= 1
    return sequences[:, :stop]
