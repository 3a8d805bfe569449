"""Refusal of models in training mode, where that changes what they compute."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from codebook.errors import CodebookError
from codebook.models.base import Model

DROP_RATES = ("p", "dropout", "attention_dropout", "drop_prob")
"""Attributes of modules that hold the share of numbers which training drops."""


def check_evaluating(model: Model) -> None:
    """Raise a CodebookError for a model that computes something else in training mode, and is in it.

    A model whose rates of dropout are all 0, as those of most language models, is the same in both.
    """
    for name, part in model.named_modules():
        if part.training and (isinstance(part, _BatchNorm) or _drops(part)):
            raise CodebookError(
                f"the model is in training mode, in which {name} changes from call to call: call model.eval() first"
            )


def _drops(part: nn.Module) -> bool:
    rates = (vars(part).get(name) for name in DROP_RATES)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
