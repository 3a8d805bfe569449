"""The schedules that a calibration tries: a method with a deep stage behind it, all of one budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from codebook import models
from codebook.errors import CodebookError, quoted
from codebook.models.base import Model
from codebook.pruning import Schedule
from codebook.pruning.presets import SCHEDULE_PRESETS, expand
from codebook.pruning.stage import Keep, check_stage
from codebook.pruning.text import DROP, StageText, cut_mass, read_text, spell_mass
from codebook.store.codebook import Codebook

SHARES = (0.75, 0.5, 0.25, 0.125)
"""Token counts tried for the deep stage, as shares of the first stage's."""

DEEP_LAYERS = 12
"""How many layers are tried for the deep stage, evenly spaced behind the first stage."""


def candidate_schedules(
    model: Model,
    method: str,
    keep: Keep,
    codebook: Codebook | None = None,
    *,
    drop: bool = True,
    deep: Sequence[str] = (),
    at: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[Schedule, list[Schedule]]:
    """A method alone at a budget, and schedules of the same budget with a deep stage that gives up tokens.

    Parameters
    ----------
    method
        One method in the text form of schedules, without a keep: `codebook`, `fastv@3`, `seeded; spread=codebook`.
    keep
        The budget: visual tokens averaged over the layers, a fraction or a count as in `Schedule.fit`.
    codebook
        Prototypes, for methods that need them.
    drop
        Also try to drop all tokens.
    deep
        Methods to try in the deep stage beside random tokens, in the text form without a keep: with a layer there
        alone, as in `fastv(query='question')@11` behind a measured onset, else at each.
    at
        Layers to try for the deep stage; default: up to 12, evenly spaced behind the first stage.
    seed
        Seed of methods that draw at random.

    Returns
    -------
    (plain, candidates)

    Raises
    ------
    CodebookError
        If the method is more than one stage, or cannot meet the budget, or if a deep one can be at no layer.
    """
    check_method(method)
    for one in deep:
        check_deep(one)
    size = models.shape(model)
    n, layers, stages = size.tokens, size.layers, size.stages

    def solved(text: str) -> Schedule:
        return Schedule.draft(text, codebook, layers=layers, seed=seed)[0].fit_images(keep, n, layers)

    plain = solved(method)
    first = plain.stages[0].layer
    if at is None:
        deeper = stages - 1 - first
        at = [round(x) for x in np.linspace(first + 1, stages - 1, min(DEEP_LAYERS, deeper))]
    elif not all(first < layer < stages for layer in at):
        raise CodebookError(f"deep stages of {method!r} can be at layers {first + 1} to {stages - 1}, not {list(at)}")
    found: dict[str, Schedule] = {}
    name, semicolon, settings = method.partition(";")
    tried = [f"random@{layer}:{share}" for layer in at for share in SHARES]
    tried += [f"drop@{layer}" for layer in at if drop]
    groups: list[tuple[str | None, list[str]]] = [(None, tried)]
    groups += [(text, _deep_stages(text, at, first, stages)) for text in deep]
    for text, own in groups:
        refused: list[CodebookError] = []
        for second in own:
            try:
                schedule = solved(f"{name}+{second}{semicolon}{settings}")
            except CodebookError as error:  # such as: the first stage cannot keep as many more as this one saves
                refused.append(error)
                continue
            if schedule.stages[0].count(n) != plain.stages[0].count(n):
                found[str(schedule)] = schedule
        if text is not None and len(refused) == len(own):
            raise CodebookError(f"the deep stage {quoted(text)} can be tried nowhere: {refused[0]}")
    return plain, list(found.values())


def check_method(text: str) -> None:
    """Refuse what is not one method, before a model is loaded.

    Raises
    ------
    CodebookError
    """
    stages = expand(text, layers=1)[0].stages
    if len(stages) != 1 or stages[0].method == DROP or stages[0].adaptive:
        raise CodebookError(
            f"calibration puts a deep stage behind one method alone, not behind {quoted(text)}: name a method"
        )


def check_deep(text: str) -> StageText:
    """The stage that the text of a deep one says; refuses what can be at no layer of any model.

    Raises
    ------
    CodebookError
    """
    written = read_text(text, others=SCHEDULE_PRESETS)
    if len(written.stages) != 1 or written.settings or written.stages[0].keep is not None:
        raise CodebookError(f"a deep stage is one method, its layer if need be, and no more: not {quoted(text)}")
    [part] = written.stages
    if part.method == DROP:
        raise CodebookError(f"a deep stage that drops all tokens is tried as it is: leave {quoted(text)} out")
    if part.adaptive:
        raise CodebookError(f"a deep stage gives up a share of the tokens, and {part.method} decides itself how many")
    if part.layer == 0:
        raise CodebookError(
            f"the deep stage {quoted(text)} is before the LLM: name a layer behind the first stage, or none"
        )
    check_stage(part.layer or 1, 1.0, part.mass, part.entry, part.method)
    return part


def _deep_stages(text: str, at: Sequence[int], first: int, stages: int) -> list[str]:
    """A deep stage's text with each share to try: at its layer, or at each of the layers if it names none."""
    layer = check_deep(text).layer
    if layer is not None and not first < layer < stages:
        raise CodebookError(f"the deep stage {quoted(text)} can be at layers {first + 1} to {stages - 1}")
    method, mass = cut_mass(text.strip())
    places = [method] if layer is not None else [f"{method}@{layer}" for layer in at]
    return [f"{place}:{share}{spell_mass(mass)}" for place in places for share in SHARES]
