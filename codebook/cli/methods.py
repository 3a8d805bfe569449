"""Methods by the names that `bench`, `show` and `calibrate` are given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from codebook.errors import CodebookError
from codebook.evaluation.bench import UNPRUNED
from codebook.models.base import Model
from codebook.pruning import Pruner
from codebook.pruning.plan import Plan, find_codebook
from codebook.pruning.text import split


def parse_methods(text: str) -> list[str]:
    """Methods, presets, hybrids or schedule files, separated by commas; each is checked."""
    names = [name.strip() for _, name in split(text, ",") if name.strip()]
    if not names:
        raise CodebookError("name a method at least, as `codebook list` does")
    plans = [Plan(name) for name in names]
    return [plan.schedule for plan in plans if plan.schedule != UNPRUNED]


def pruner_maker(model: Model, codebook: Path | None, seed: int) -> Callable[[str], Pruner]:
    """A function that makes a pruner by its name; it reads the codebook once, and only if a pruner needs one."""
    return Plan("codebook", None, None, codebook, seed).maker(functools.cache(lambda: find_codebook(model, codebook)))
