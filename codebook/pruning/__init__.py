"""Online: schedules of stages, the pruning methods, and the one mechanism that applies them to a model."""

from typing import Any

from codebook.pruning import methods
from codebook.pruning.methods import *  # noqa: F403
from codebook.pruning.schedule import Schedule
from codebook.pruning.stage import Stage
from codebook.pruning.tokens import VisualTokens

__all__ = ["Schedule", "Stage", "VisualTokens", "remember"]  # noqa: F405  by __getattr__
__all__ += methods.__all__  # a new method is public with its entry there; `__init__.pyi` says so to type checkers


def __getattr__(name: str) -> Any:
    if name == "remember":  # the engine imports transformers, which schedules and methods do without
        from codebook.pruning.engine.memory import remember

        return remember
    raise AttributeError(f"module 'codebook.pruning' has no attribute {name!r}")
