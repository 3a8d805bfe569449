"""The pruning methods, one small file each. `METHODS` names them as schedules spell them."""

from collections.abc import Callable
from functools import partial

from codebook.pruning.methods.alpha import Alpha
from codebook.pruning.methods.base import Pruner, ScoringPruner
from codebook.pruning.methods.combine import Union, Window
from codebook.pruning.methods.divprune import DivPrune
from codebook.pruning.methods.fastv import FastV
from codebook.pruning.methods.random import Random
from codebook.pruning.methods.redundancy import RedundancyCodebook
from codebook.pruning.methods.uniform import Uniform

__all__ = [
    "METHODS",
    "Alpha",
    "DivPrune",
    "FastV",
    "Pruner",
    "Random",
    "RedundancyCodebook",
    "ScoringPruner",
    "Uniform",
    "Union",
    "Window",
]

METHODS: dict[str, Callable[..., Pruner]] = {
    "alpha": Alpha,
    "codebook": RedundancyCodebook,
    "divprune": DivPrune,
    "fastv": FastV,
    "fastv-norope": partial(FastV, rotated=False),
    "fastv-reverse": partial(FastV, reverse=True),
    "fastv-vis": partial(FastV, query="visual"),
    "fastv-window": partial(Window, FastV()),
    "feather-ensemble": partial(Union, Uniform(), FastV(rotated=False)),
    "random": Random,
    "uniform": Uniform,
}
