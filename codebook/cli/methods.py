"""Methods by the names that `bench`, `show` and `calibrate` are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from codebook.errors import CodebookError
from codebook.models.base import Model
from codebook.pruning.plan import Plan
from codebook.pruning.presets import needs_codebook
from codebook.pruning.text import UNPRUNED, split
from codebook.store.codebook import Codebook
from codebook.store.shipped import find_codebook


def parse_methods(text: str) -> list[str]:
    """Methods, presets, hybrids or schedule files, separated by commas, each once; each is checked."""
    names = [name.strip() for _, name in split(text, ",") if name.strip()]
    if not names:
        raise CodebookError("name a method at least, as `codebook list` does")
    plans = [Plan(name) for name in names]
    return list(dict.fromkeys(plan.schedule for plan in plans if plan.schedule != UNPRUNED))


def codebook_for(model: Model, methods: Sequence[str], folder: Path | None) -> Codebook | None:
    """The one codebook for all methods that need one, from a folder or shipped; None if no method needs one."""
    return find_codebook(model, folder) if any(map(needs_codebook, methods)) else None
