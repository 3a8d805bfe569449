"""The layer of a schedule's last stage where its text leaves it to the information horizon: measured, or a guess."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from codebook.errors import CodebookError, quoted
from codebook.models import Model, shape
from codebook.pruning.presets import expand, leaves_horizon
from codebook.store.codebook import Codebook
from codebook.store.horizons import find_horizon


def deep_layer(model: Model, text: str, fitted: bool, source: Codebook | Path | str | None = None) -> int | None:
    """The layer that `expand` takes as its horizon for a loaded model: one that was measured, on all tasks together.

    Parameters
    ----------
    text, fitted
        A schedule's text, and whether it will be fitted to a budget (`leaves_horizon`).
    source
        The codebook that was named, whose folder is looked in first (`find_horizon`).

    Returns
    -------
    None where the text names its layers. Where nothing is measured, LLaVA-1.5-7B's, scaled, or the last that stages can
    be at: that is logged as a warning, once for each text and model size.

    Raises
    ------
    CodebookError
        If a measurement says that the model reads its images to the last layer.
    """
    if not leaves_horizon(text, fitted):
        return None
    size = shape(model)
    layers = size.layers
    guess = min(expand(text, layers)[0].stages[-1].layer or 0, size.stages - 1)
    found = find_horizon(model, source)
    if found is None:
        _warn(text, layers, guess, "nothing was measured on this model")
    elif found.safe is None:
        _warn(text, layers, guess, f"{found.file} {found.unknown}")
    elif found.safe >= size.stages:
        last = "the last layer" if size.stages == layers else f"layer {size.stages - 1}, the last that stages can be at"
        raise CodebookError(
            f"{found.file}: this model reads its images to {last}, so {quoted(text)} has no layer to begin its "
            f"last stage at: leave that stage out, or name its layer, 1 to {size.stages - 1}, as in random@{guess}"
        )
    else:
        return found.safe
    return guess


@cache
def _warn(text: str, layers: int, guess: int, why: str) -> None:
    logging.getLogger(__name__).warning(
        "%s: its last stage begins at layer %s of %s, which is a guess, LLaVA-1.5-7B's layer scaled (%s); a few layers "
        "too early can cost most answers: measure with `codebook horizon`, or name the layer, as in random@%s",
        text, guess, layers, why, guess,
    )  # fmt: skip
