"""Stages made of what a text says of them: pruners, with a codebook and a seed."""

from __future__ import annotations

from typing import Any

from codebook.errors import CodebookError
from codebook.pruning.checks import checked
from codebook.pruning.methods import Pruner
from codebook.pruning.stage import Stage
from codebook.pruning.text import FROM_CODEBOOK, ScheduleText, StageText
from codebook.store.codebook import Codebook


def make_stages(written: ScheduleText, codebook: Codebook | None, seed: int) -> tuple[list[Stage], dict[str, Any]]:
    """The stages of a text, and those of the settings that it gives.

    Parameters
    ----------
    codebook
        Prototypes for the stages whose methods need them.
    seed
        Seed of methods that draw at random, where the text says none.

    Raises
    ------
    CodebookError
        If the stages make no schedule, or the codebook that one needs is not there.
    """
    parts, settings = checked(written), dict(written.settings)
    stages = [Stage(part.layer or 0, part.keep, _pruner(part, codebook, seed), part.mass) for part in parts]
    if settings.get("spread") == FROM_CODEBOOK:
        assert codebook is not None  # `checked`: a stage needs it
        if codebook.spread is None:
            raise CodebookError("the codebook does not say the spread of its images: build it again with this "
                                "version, or write the usual spread, as in spread=0.2")  # fmt: skip
        settings["spread"] = float(codebook.spread)
    return stages, settings


def _pruner(stage: StageText, codebook: Codebook | None, seed: int) -> Pruner:
    options = dict(stage.options)
    if stage.entry.needs_codebook:
        if codebook is None:
            stage.fail(f"method {stage.method!r} needs a codebook, which no text holds: pass codebook=, or take "
                       "Schedule.for_model, which finds the model's")  # fmt: skip
        options["codebook"] = codebook
    if stage.entry.draws:
        options.setdefault("seed", seed)
    return stage.entry(**options)
