"""Pruning that is switched on and off, for notebooks and servers: the context of a `with`, kept open between calls."""

from __future__ import annotations

import logging

from codebook.errors import CodebookError
from codebook.models.base import Model
from codebook.models.wrappers import stock
from codebook.pruning.engine.attachment import Attachment
from codebook.pruning.engine.calls import ATTACHING
from codebook.pruning.engine.context import Pruning
from codebook.pruning.schedule import Schedule


def enable(model: Model, schedule: Schedule) -> Pruning:
    """Prune every call of the model from now on, from whatever thread, until `disable`.

    It is the context of `with schedule(model)`, left open. Contexts of scope `thread` take precedence inside it, so one
    thread can still ask under another schedule, or under `Schedule([])`: unpruned.

    Parameters
    ----------
    model
        Any supported model. It can be freed as always: what is enabled goes with it.
    schedule
        What to prune.

    Returns
    -------
    The context: its `images` and `kept` are the last call's, its `statistics` add up over all

    Raises
    ------
    CodebookError
        If the model is enabled already, or a `with` of the whole model is open: to replace a schedule under calls of
        other threads without a word would answer them by one that they did not ask for. Else as calling the schedule.
    """
    pruning = Schedule.of(schedule)(model)
    with ATTACHING:
        pruning.__enter__()
        pruning.enabled = True
    logging.getLogger(__name__).info("enabled '%s' on a %s", schedule, type(pruning.model).__name__)
    return pruning


def disable(model: Model) -> Pruning:
    """Undo `enable`, from any thread; calls that are running end as they began.

    Returns
    -------
    The context, closed: what it kept and its statistics can still be read

    Raises
    ------
    CodebookError
        If the model is not enabled: it may be another one that still is, or a `with` that prunes it.
    """
    model = stock(model)  # also one that was compiled since
    with ATTACHING:
        pruning = Attachment.of(model).calls.enabled()
        if pruning is None:
            raise CodebookError(
                f"this {type(model).__name__} is not enabled, so there is nothing to disable: a context of `with` ends "
                "by itself"
            )
        pruning.__exit__(None, None, None)
    logging.getLogger(__name__).info("disabled '%s': %s", pruning.schedule, pruning.tally.read(wait=False))
    return pruning
