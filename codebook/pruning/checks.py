"""Checks of what makes a schedule of stages: of texts, before there is a codebook, and of every `Schedule`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from codebook.errors import CodebookError, quoted
from codebook.pruning.stage import Stage, check_stage
from codebook.pruning.text import DROP, FROM_CODEBOOK, SETTINGS, ScheduleText, StageText


def check_schedule(stages: Sequence[Stage | StageText], positions: str, quotas: str, spread: float | None) -> None:
    """Raise a CodebookError unless these stages, each of them good, and settings make a schedule.

    Stages as written stand for those that are made of them, so that a text is checked before there is a codebook.
    """
    if positions not in ("keep", "compact"):
        raise CodebookError(f"positions must be 'keep' or 'compact', not {quoted(positions)}")
    if quotas not in ("each", "shared"):
        raise CodebookError(f"quotas must be 'each' or 'shared', not {quoted(quotas)}")
    if spread is not None and not (isinstance(spread, int | float) and spread is not True and 0 < spread < math.inf):
        raise CodebookError(f"spread must be a number above 0, the usual spread of images, not {quoted(spread)}")
    if spread is not None and any(stage.adaptive for stage in stages):
        raise CodebookError("a stage decides how many tokens stay of each image: leave spread out")
    if quotas == "shared" and any(stage.joint for stage in stages):
        raise CodebookError("a stage's method divides the budget among frames itself: leave quotas=shared out")
    for before, after in pairwise(stages):
        earlier, later = before.layer or 0, after.layer or 0
        if later <= earlier:
            raise CodebookError(f"stages must be at ascending layers: {later} follows {earlier}")
        if before.keep == 0:
            raise CodebookError(f"nothing is left for the stage at layer {later}: leave it out")
        if before.keep and after.keep and type(after.keep) is type(before.keep) and after.keep > before.keep:
            raise CodebookError(
                f"the stage at layer {later} keeps more ({after.keep}) than the one before it "
                f"({before.keep}): dropped tokens do not come back"
            )


def checked(written: ScheduleText) -> list[StageText]:
    """The stages of a text, each with its layer, if they make a schedule.

    Raises
    ------
    CodebookError
        Whatever is wrong with them that does not depend on the model and its codebook.
    """
    settings = SETTINGS | written.settings
    if settings["spread"] == FROM_CODEBOOK:
        if not written.needs_codebook:
            raise CodebookError("no stage has a codebook that could say the usual spread: write it, as in spread=0.2")
        settings["spread"] = 1.0  # the codebook will say another one
    stages = []
    for part in written.stages:
        if part.method == DROP and (not part.layer or part.keep):
            part.fail("drop needs a layer, 1 or later, and keeps nothing: write drop@21")
        stage = replace(part, layer=part.layer or 0, keep=0 if part.method == DROP else part.keep)
        try:
            check_stage(stage.layer or 0, stage.keep, stage.mass, stage.entry, stage.entry.kind.__name__)
        except CodebookError as error:
            part.fail(str(error))
        stages.append(stage)
    check_schedule(stages, **settings)
    return stages
