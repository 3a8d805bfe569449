"""The logits processors of a model's `generation_config` that read the prompt, without the padding of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from codebook.models.base import Model

Make = Callable[[Any, Any, Any], LogitsProcessor]
READERS: dict[str, tuple[float, Make]] = {
    "encoder_repetition_penalty": (
        1.0,
        lambda value, prompt, _: EncoderRepetitionPenaltyLogitsProcessor(value, prompt),
    ),
    "repetition_penalty": (1.0, lambda value, *_: RepetitionPenaltyLogitsProcessor(value)),
    "no_repeat_ngram_size": (0, lambda value, *_: NoRepeatNGramLogitsProcessor(value)),
    "encoder_no_repeat_ngram_size": (0, lambda value, prompt, _: EncoderNoRepeatNGramLogitsProcessor(value, prompt)),
    "min_length": (0, lambda value, prompt, ends: MinLengthLogitsProcessor(value, ends, str(prompt.device))),
}
"""Settings whose processors read all of a prompt, in the order of `generate`: the value that switches one off, and what
makes its processor of a value, a row (1, n) of tokens and the tokens that end an answer. Others read the last tokens
alone, or count the new ones."""


class WithoutPadding(LogitsProcessor):
    """Processors for each row of a batch, which see the row as it would be alone: `generate` counts padding as text.

    Parameters
    ----------
    starts
        For each row the number of its tokens that are padding, on the left.
    rows
        For each row its processors.
    """

    def __init__(self, starts: Sequence[int], rows: Sequence[LogitsProcessorList]) -> None:
        self._starts, self._rows = starts, rows

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return torch.cat([
            own(input_ids[row : row + 1, start:], scores[row : row + 1])
            for row, (start, own) in enumerate(zip(self._starts, self._rows, strict=True))
        ])  # fmt: skip


def without_padding(
    model: Model, inputs: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[list[LogitsProcessor], dict[str, float]]:
    """(processors, options) of `generate` by which a batch with padding is answered as each of its rows alone.

    Parameters
    ----------
    inputs
        What the model is given, padded on the left.
    options
        Options of `generate` that take the place of the model's own.
    """
    starts = (inputs["attention_mask"] != 0).int().argmax(1).tolist() if "attention_mask" in inputs else [0]
    config, ids = model.generation_config, inputs["input_ids"]
    given = {name: options.get(name, getattr(config, name, None)) for name in READERS}
    given = {name: value for name, value in given.items() if value not in (None, READERS[name][0])}
    if config.eos_token_id is None:  # what does not end has no shortest length
        given.pop("min_length", None)
    if not any(starts) or not given:
        return [], {}
    ends = torch.as_tensor(config.eos_token_id, device=ids.device).flatten() if "min_length" in given else None
    rows = [
        LogitsProcessorList(READERS[name][1](value, ids[row : row + 1, start:], ends) for name, value in given.items())
        for row, start in enumerate(starts)
    ]
    return [WithoutPadding(starts, rows)], {name: READERS[name][0] for name in given}
