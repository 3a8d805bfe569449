"""How probable known answers are under a schedule: one prefill and one forward instead of a forward a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codebook.inference.prompts import answer_ids, prepare_samples, text_length
from codebook.inference.samples import Sample
from codebook.pruning import Schedule


@dataclass(frozen=True)
class Batch:
    """Samples whose prompts have the same length, so that none is padded.

    Attributes
    ----------
    inputs
        The model's, one row a sample.
    answers : (b, t) int64
        Token ids, padded at the end.
    known : (b, t) bool
        Which of them are not padding.
    """

    inputs: Any
    answers: Tensor
    known: Tensor


def groups(processor: Any, samples: Sequence[Sample], rows: Sequence[int], size: int) -> list[list[int]]:
    """Cut samples into batches whose prompts have one length: an image is as many tokens in each of them."""
    lengths: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        key = len(samples[row].images), text_length(processor, samples[row])
        lengths.setdefault(key, []).append(row)
    return [own[i : i + size] for _, own in sorted(lengths.items()) for i in range(0, len(own), size)]


def load(model: Any, processor: Any, samples: Sequence[Sample]) -> list[Batch]:
    """A group of samples, all with answers, as one batch; as one each where images of several sizes would be padded."""
    inputs = prepare_samples(model, processor, samples).inputs
    if len(samples) > 1 and not bool(inputs["attention_mask"].all()):
        return [batch for sample in samples for batch in load(model, processor, [sample])]
    ids = [torch.tensor(answer_ids(processor, sample), device=model.device) for sample in samples]
    answers = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(own) for own in ids], device=model.device)
    return [Batch(inputs, answers, torch.arange(answers.shape[1], device=model.device) < lengths[:, None])]


def probabilities(model: Any, batch: Batch, schedule: Schedule) -> Tensor:
    """Of each token of the answers, given the prompt and the answer's tokens before it, as if they were generated.

    The prompt is pruned without sight of the answer, which is then fed on top of its KV cache.

    Returns
    -------
    (b, t) float32; 0 where the answer is padded
    """
    with torch.inference_mode(), schedule(model):
        out = model(**batch.inputs, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1:]
        if batch.answers.shape[1] > 1:
            length = batch.inputs["input_ids"].shape[1] + batch.answers.shape[1] - 1
            mask = torch.ones(len(logits), length, dtype=torch.long, device=logits.device)
            fed = batch.answers[:, :-1]
            later = model(input_ids=fed, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            logits = torch.cat([logits, later.logits], dim=1)
        p = logits.float().softmax(-1).gather(-1, batch.answers[..., None])[..., 0]
    return p * batch.known


def values(model: Any, batch: Batch, schedule: Schedule) -> list[float]:
    """Each sample's mean probability of its answer's tokens."""
    return (probabilities(model, batch, schedule).sum(1) / batch.known.sum(1)).tolist()
