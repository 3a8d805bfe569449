"""What to prune, as users say it: on the command line and in other programs' settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from codebook import models
from codebook.pruning import METHODS, Pruner, Schedule
from codebook.pruning.schedule import load_text
from codebook.pruning.stage import check_keep
from codebook.pruning.text import needs
from codebook.store.codebook import Codebook
from codebook.store.shipped import prebuilt

DEFAULT = "seeded"
"""Schedule where the user says none: docs/method.md."""
KEEP = 0.2
"""Budget where neither the user nor the schedule says one."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Plan:
    """What to prune, in words; read before any model is loaded.

    `schedule` is a schedule's text, a preset, or a JSON file that `Schedule.save` wrote; `keep` the budget that it is
    fitted to, `positions` its position policy if not its own.
    """

    schedule: str
    keep: float | None = None
    positions: Any = None
    codebook: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        if self.schedule.endswith(".json"):
            object.__setattr__(self, "schedule", load_text(self.schedule))
        # Errors of the text show now, those that depend on the model in `apply`. One layer: presets' layers are then as
        # early as in any model, and clash with the text's own only if they always do.
        draft, needs_budget = Schedule.draft(self.schedule, self.maker(lambda: None), layers=1)
        self._placed(draft)
        if needs_budget and self.keep is None:
            object.__setattr__(self, "keep", KEEP)

    def apply(self, model: Any) -> Schedule:
        """The schedule for a loaded model; reads its codebook only if a stage needs one."""
        size = models.shape(model)
        make = self.maker(lambda: find_codebook(model, self.codebook))
        schedule, _ = Schedule.draft(self.schedule, make, size.layers)
        return self._placed(schedule if self.keep is None else _fitted(schedule, self.keep, size.tokens, size.layers))

    def _placed(self, schedule: Schedule) -> Schedule:
        return schedule if self.positions is None else replace(schedule, positions=self.positions)

    def maker(self, codebook: Callable[[], Any]) -> Callable[[str], Pruner]:
        """Makes the pruner of a method's name; `codebook` gives the prototypes where they are needed."""

        def make(name: str) -> Pruner:
            factory = METHODS[name]
            if name == "random":
                return factory(self.seed)
            return factory(codebook()) if needs(name) else factory()

        return make


def _fitted(draft: Schedule, keep: int | float, n: int, layers: int) -> Schedule:
    """At a budget; where that is a share, images of other sizes keep as large a one, unless the text says a count."""
    fitted = draft.fit(keep, n=n, layers=layers)
    if isinstance(keep, int):
        return fitted
    stages = [
        count if isinstance(said.keep, int) else share
        for said, count, share in zip(draft.stages, fitted.stages, fitted.shares(n).stages, strict=True)
    ]
    return replace(fitted, stages=stages)


def find_codebook(model: Any, folder: Path | None) -> Codebook:
    """The codebook in a folder, checked to be this model's, or the one that ships for it."""
    if folder is None:
        return prebuilt(model)
    book = Codebook.load(folder)
    book.check(model)
    return book
