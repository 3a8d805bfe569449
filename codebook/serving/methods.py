"""The methods that a service offers for a comparison, by name, and their schedules."""

from __future__ import annotations

import re
from contextlib import nullcontext, suppress
from functools import lru_cache
from pathlib import Path

from codebook.errors import CodebookError, quoted
from codebook.models.base import Model
from codebook.pruning import METHODS, Pruner, Schedule
from codebook.pruning.presets import DEFAULT, SCHEDULE_PRESETS, needs_codebook
from codebook.pruning.text import DISTANCE, UNPRUNED, WITH_MASS
from codebook.serving.errors import ServiceError
from codebook.store.codebook import Codebook
from codebook.store.shipped import find_codebook

TRIED_KEEP = 0.5
"""Budget at which a method is tried; every preset reaches it."""
SCHEDULES_HELD = 256
"""Schedules that are kept for the next request with the same method and budget."""


class Methods:
    """The methods that work on a model without being told more than a budget.

    Parameters
    ----------
    codebook
        Folder of the codebook for methods that need one; None: the one that ships for the model, if one does.
    seed
        Seed of methods that draw at random.

    Attributes
    ----------
    offered : dict[str, str]
        For each name one sentence about the method. The default method is the first.
    """

    def __init__(self, model: Model, codebook: Path | None = None, seed: int = 0) -> None:
        self._model, self._seed = model, seed
        self._codebook: Codebook | None = None
        with suppress(CodebookError) if codebook is None else nullcontext():  # for many models no codebook ships
            self._codebook = find_codebook(model, codebook)
        self.schedule = lru_cache(SCHEDULES_HELD)(self._make)
        self.offered = {name: text for name, text in described().items() if self._works(name)}

    def _make(self, name: str, keep: float) -> Schedule:
        """The schedule of an offered method, or of `unpruned`, at a budget.

        Raises
        ------
        ServiceError
            If no such method is offered.
        CodebookError
            If the method does not reach the budget.
        """
        if name == UNPRUNED:
            return Schedule([])
        if name not in self.offered:
            raise ServiceError(
                422, f"no method {quoted(name)} is offered here: GET /v1/compare lists them", None, "ways"
            )
        return Schedule.for_model(self._model, name, keep, self._codebook, seed=self._seed)

    def _works(self, name: str) -> bool:
        if self._codebook is None and needs_codebook(name):
            return False
        try:
            Schedule.for_model(self._model, name, TRIED_KEEP, self._codebook, seed=self._seed)(self._model, "thread")
        except CodebookError:  # it needs a layer, decides itself how many tokens stay, or does not fit the model
            return False
        return True


def _about(kind: type[Pruner], option: str) -> str:
    """The first sentence about an option in the docstring of a pruner's class, or of the class that it comes from."""
    docs = (one.__doc__ or "" for one in kind.__mro__)
    found = (re.search(rf"^    {option}\n\s+(.*?\.)(\s|$)", doc, re.MULTILINE | re.DOTALL) for doc in docs)
    return next((" ".join(one[1].split()) for one in found if one), f"Here: {option}.")


def described() -> dict[str, str]:
    """Every method and preset with one sentence about it, the default method first."""
    found = {}
    for name, method in METHODS.items():
        given = {key: value for key, value in method.options.items() if key in method.given}
        options = [
            _about(method.kind, key) if value is True else f"Here: {key}={value}." for key, value in given.items()
        ]
        found[name] = " ".join([(method.kind.__doc__ or "").partition("\n")[0], *options])
    found |= {name: f"A preset: {text}." for name, text in SCHEDULE_PRESETS.items()}
    for name, (base, mass) in WITH_MASS.items():
        distance = " and RESTORE's distance calibration" if mass == DISTANCE else ""
        found[name] = f"{found[base]} With mass-preserving attention{distance}."
    return {DEFAULT: found.pop(DEFAULT), **found}
