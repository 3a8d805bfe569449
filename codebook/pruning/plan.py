"""What to prune, as users say it: on the command line and in other programs' settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from codebook.models.base import Model
from codebook.pruning.checks import check_schedule, checked
from codebook.pruning.presets import KEEP, expand
from codebook.pruning.schedule import Schedule
from codebook.pruning.schedule_file import read_schedule_text
from codebook.pruning.stage import check_keep


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
            object.__setattr__(self, "schedule", read_schedule_text(self.schedule))
        # Errors of the text show now, those that depend on the model in `apply`. One layer: presets' layers are then as
        # early as in any model, and clash with the text's own only if they always do.
        written, needs_budget = expand(self.schedule, layers=1)
        checked(written)
        if self.positions is not None:
            check_schedule((), self.positions, "each", None)
        if needs_budget and self.keep is None:
            object.__setattr__(self, "keep", KEEP)

    def apply(self, model: Model) -> Schedule:
        """The schedule for a loaded model; reads its codebook only if a stage needs one."""
        schedule = Schedule.for_model(model, self.schedule, self.keep, self.codebook, seed=self.seed)
        return schedule if self.positions is None else replace(schedule, positions=self.positions)
