"""What all parts of the service share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from codebook.models.base import Model, Processor
from codebook.pruning import Schedule
from codebook.serving.limits import Limits
from codebook.serving.metrics import Metrics
from codebook.serving.shelf import Shelf

if TYPE_CHECKING:
    from codebook.serving.model_thread import ModelThread


@dataclass(kw_only=True)
class State:
    """A running service.

    Attributes
    ----------
    shelf
        The codebooks that are scored against, by name.
    limits
        What is beyond them is refused.
    api_key
        What clients must send; None: anybody who reaches the service may ask.
    allowed_hosts
        Hosts, with their ports if not the usual ones, whose images are fetched.
    local
        Whether the service listens to this machine alone.
    draining
        Whether the service is about to end: what it has accepted is answered, new requests are refused.
    active
        Requests that are accepted and not yet answered.
    """

    metrics: Metrics
    shelf: Shelf = field(default_factory=Shelf)
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    local: bool = False
    draining: bool = False
    active: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(kw_only=True)
class ModelState(State):
    """A running service that has a model.

    Attributes
    ----------
    name
        What clients call the model.
    schedule
        What prunes every prompt.
    model_thread
        The thread that the model runs on; whatever else needs the model waits there, too, as an `Errand`.
    codebook, seed
        Folder of the codebook and the seed for the methods of a comparison; None: the codebook that ships.
    examples
        Questions for the page: for each its `question`, `answer` and `image`, a data URL.
    """

    name: str
    model: Model
    processor: Processor
    schedule: Schedule
    model_thread: ModelThread
    codebook: Path | None = None
    seed: int = 0
    examples: tuple[dict[str, str], ...] = ()
