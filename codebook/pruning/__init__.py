"""Online: schedules of stages, the pruning methods, and the one mechanism that applies them to a model."""

from importlib import import_module
from typing import Any

from codebook.pruning import methods

# Imported when first used: listing methods needs no torch, and only the engine needs transformers.
_LATE = {
    "Schedule": "schedule",
    "Stage": "stage",
    "VisualTokens": "tokens",
    "disable": "engine.enabling",
    "enable": "engine.enabling",
    "remember": "engine.memory",
}

__all__ = [*_LATE]
__all__ += methods.__all__  # a new method is public with its entry there; `__init__.pyi` says so to type checkers


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    if name in methods.__all__:
        return getattr(methods, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
