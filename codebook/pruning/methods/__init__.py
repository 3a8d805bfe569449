"""The pruning methods, one small file each. `METHODS` names them as schedules spell them."""

from codebook.pruning.methods.base import Pruner, ScoringPruner
from codebook.pruning.methods.divprune import DivPrune
from codebook.pruning.methods.fastv import FastV
from codebook.pruning.methods.random import Random
from codebook.pruning.methods.redundancy import RedundancyCodebook
from codebook.pruning.methods.uniform import Uniform

__all__ = ["METHODS", "DivPrune", "FastV", "Pruner", "Random", "RedundancyCodebook", "ScoringPruner", "Uniform"]

METHODS: dict[str, type[Pruner]] = {
    "codebook": RedundancyCodebook,
    "divprune": DivPrune,
    "fastv": FastV,
    "random": Random,
    "uniform": Uniform,
}
