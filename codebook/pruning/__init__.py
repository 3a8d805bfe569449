"""Online: schedules of stages, the pruning methods, and the one mechanism that applies them to a model."""

from codebook.pruning.methods import (
    METHODS,
    Alpha,
    DivPrune,
    FastV,
    Pruner,
    Random,
    RedundancyCodebook,
    ScoringPruner,
    Uniform,
    Union,
    Window,
)
from codebook.pruning.schedule import Schedule, Stage
from codebook.pruning.tokens import VisualTokens

__all__ = [
    "METHODS",
    "Alpha",
    "DivPrune",
    "FastV",
    "Pruner",
    "Random",
    "RedundancyCodebook",
    "Schedule",
    "ScoringPruner",
    "Stage",
    "Uniform",
    "Union",
    "VisualTokens",
    "Window",
]
