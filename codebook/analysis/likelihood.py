"""Probability of known answers under a schedule: one prefill and one forward instead of one forward per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codebook.inference.prompts import answer_ids, prepare_samples, text_length
from codebook.inference.samples import Sample
from codebook.models.base import Model, Processor
from codebook.models.finite import check_logits
from codebook.pruning import Schedule


@dataclass(frozen=True)
class AnswerBatch:
    """Samples whose prompts have the same length, so that no prompt is padded.

    Attributes
    ----------
    inputs
        Inputs of the model, one row per sample.
    answers : (b, t) int64
        Token ids of the answers, padded at the end.
    known : (b, t) bool
        Which of those ids are not padding.
    """

    inputs: Any
    answers: Tensor
    known: Tensor


def equal_lengths(processor: Processor, samples: Sequence[Sample], rows: Sequence[int], size: int) -> list[list[int]]:
    """Cut samples into batches whose prompts have equal length, if every image has the same number of tokens.

    Parameters
    ----------
    rows
        Which of the samples to take.
    size
        Most samples per batch.

    Returns
    -------
    Rows of each batch
    """
    lengths: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        key = len(samples[row].images), text_length(processor, samples[row])
        lengths.setdefault(key, []).append(row)
    return [own[i : i + size] for _, own in sorted(lengths.items()) for i in range(0, len(own), size)]


def answer_batches(model: Model, processor: Processor, samples: Sequence[Sample]) -> list[AnswerBatch]:
    """Samples with answers as one batch; one batch per sample where their prompts differ in length after all."""
    inputs = prepare_samples(model, processor, samples).inputs
    if len(samples) > 1 and not bool(inputs["attention_mask"].all()):
        return [batch for sample in samples for batch in answer_batches(model, processor, [sample])]
    ids = [torch.tensor(answer_ids(processor, sample), device=model.device) for sample in samples]
    answers = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(own) for own in ids], device=model.device)
    return [AnswerBatch(inputs, answers, torch.arange(answers.shape[1], device=model.device) < lengths[:, None])]


def probabilities(model: Model, batch: AnswerBatch, schedule: Schedule) -> Tensor:
    """Probability of each token of the answers, given the prompt and the answer's tokens before it.

    The prompt is pruned without sight of the answer, which is then fed on top of the prompt's KV cache: the same
    probabilities as if the answer were generated.

    Returns
    -------
    (b, t) float32; 0 where the answer is padded
    """
    with torch.inference_mode(), schedule(model, "thread"):
        out = model(**batch.inputs, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1:]
        if batch.answers.shape[1] > 1:
            length = batch.inputs["input_ids"].shape[1] + batch.answers.shape[1] - 1
            mask = torch.ones(len(logits), length, dtype=torch.long, device=logits.device)
            fed = batch.answers[:, :-1]
            later = model(input_ids=fed, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            logits = torch.cat([logits, later.logits], dim=1)
        check_logits(logits)
        p = logits.float().softmax(-1).gather(-1, batch.answers[..., None])[..., 0]
    return p * batch.known


def mean_probabilities(model: Model, batch: AnswerBatch, schedule: Schedule) -> list[float]:
    """Each sample's mean probability of its answer's tokens."""
    return (probabilities(model, batch, schedule).sum(1) / batch.known.sum(1)).tolist()
