"""Online: schedules of stages, the pruning methods, and the one mechanism that applies them to a model."""

from codebook.pruning import methods
from codebook.pruning.engine.memory import remember
from codebook.pruning.methods import *  # noqa: F403
from codebook.pruning.schedule import Schedule
from codebook.pruning.stage import Stage
from codebook.pruning.tokens import VisualTokens

__all__ = ["Schedule", "Stage", "VisualTokens", "remember"]
__all__ += methods.__all__  # a new method is public with its entry there; `__init__.pyi` says so to type checkers
