"""The token of an answer that says something about the image, and the prefill that predicts it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from codebook.analysis.prefill import Cost, Prefill
from codebook.inference.prompts import answer_ids, prepare_samples
from codebook.inference.samples import Sample
from codebook.models.base import Model, Processor


def telling_tokens(processor: Processor, samples: Sequence[Sample]) -> list[list[int]]:
    """The tokens of each answer up to the first one that says something about the image, and that one last.

    Tokenizers often begin every answer, or every number, with a token for the space before it, and answers of one task
    may all begin with the same word. Such a token is known without a look at the image, and its probability would say
    that no layer reads the image at all. So what all answers of a task begin with is passed over, and blank tokens.

    Returns
    -------
    For each sample token ids, at least one; [] for a sample without an answer
    """
    ids = [[] if sample.answer is None else answer_ids(processor, sample) for sample in samples]
    by_task: dict[str, list[list[int]]] = {}
    for sample, own in zip(samples, ids, strict=True):
        if own:
            by_task.setdefault(sample.task, []).append(own)
    shared = {task: _shared(answers) for task, answers in by_task.items()}
    telling = []
    for sample, own in zip(samples, ids, strict=True):
        at = shared.get(sample.task, 0)
        while at < len(own) - 1 and is_blank(processor, own[at]):
            at += 1
        telling.append(own[: at + 1])  # one answer may be the beginning of all others: then all of it
    return telling


def _shared(answers: Sequence[Sequence[int]]) -> int:
    """With how many tokens all answers of a task begin; 0 where they are one and the same answer."""
    if len(set(map(tuple, answers))) == 1:
        return 0
    return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*answers, strict=False))))


def is_blank(processor: Processor, token: int) -> bool:
    """Whether a token is nothing but white space, as the one before a number often is."""
    return not processor.tokenizer.decode([token]).strip()


def continued(inputs: Any, ids: Sequence[int]) -> dict[str, Any]:
    """The processor's output for one sample with the first tokens of an answer behind the prompt."""
    prompt = inputs["input_ids"]
    fill = {"input_ids": prompt.new_tensor([list(ids)])}
    fill["attention_mask"] = torch.ones_like(fill["input_ids"])
    text = torch.zeros_like(fill["input_ids"])  # what token types call text
    return {
        name: torch.cat([value, fill.get(name, text).to(value.dtype)], 1)
        if isinstance(value, torch.Tensor) and value.shape == prompt.shape
        else value
        for name, value in inputs.items()
    }


def telling_prefill(
    model: Model, processor: Processor, sample: Sample, telling: Sequence[int]
) -> tuple[Prefill, int, int, Cost]:
    """The prefill whose logits are those of a sample's telling token.

    Parameters
    ----------
    telling
        As `telling_tokens` gives them; [] for the unpruned model's own answer.

    Returns
    -------
    prefill
    id of the telling token
    number of the answer's tokens that stand behind the prompt
    cost of a further prefill, if one was needed
    """
    inputs = prepare_samples(model, processor, [sample]).inputs
    prefill = Prefill.of(model, continued(inputs, telling[:-1]))
    if telling:
        return prefill, telling[-1], len(telling) - 1, Cost()
    target = int(prefill.logits.argmax())
    if not is_blank(processor, target):
        return prefill, target, 0, Cost()
    spent, prefill = prefill.cost, Prefill.of(model, continued(inputs, [target]))  # one token further
    return prefill, int(prefill.logits.argmax()), 1, spent
