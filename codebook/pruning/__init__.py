"""Online: schedules of stages, the pruning methods, and the one mechanism that applies them to a model."""

from codebook.pruning.methods import (
    METHODS,
    DivPrune,
    FastV,
    Pruner,
    Random,
    RedundancyCodebook,
    ScoringPruner,
    Uniform,
)
from codebook.pruning.schedule import Schedule, Stage
from codebook.pruning.tokens import VisualTokens

__all__ = [
    "METHODS",
    "DivPrune",
    "FastV",
    "Pruner",
    "Random",
    "RedundancyCodebook",
    "Schedule",
    "ScoringPruner",
    "Stage",
    "Uniform",
    "VisualTokens",
]
