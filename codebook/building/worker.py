"""Probing one image of a build: what runs in this process, or on each actor of a cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from codebook import models
from codebook.building.cascade import Survivors, survivors
from codebook.building.presets import Settings
from codebook.building.probes import Prober
from codebook.building.sources import GONE, Source
from codebook.errors import CodebookError
from codebook.models import Model, Processor
from codebook.store.files import one_line
from codebook.store.pictures import decode_image

Outcome = tuple[str, str, Survivors | str]
"""Name of an image, SHA-256 of its file as it was probed, and what it yields or why it cannot be read."""
Engine = Callable[["Worker", list[str]], Iterable[Outcome]]
"""Function that probes the named images, in any order."""


@dataclass(frozen=True)
class Progress:
    """How far a build has come.

    Attributes
    ----------
    done, total
        Numbers of images.
    resumed
        How many of the images done were finished by an earlier run.
    skipped
        Names of the images done that cannot be read.
    funnel
        Tokens left by each step of `STEPS`, over the images done; `recurrent` only once all are.
    """

    done: int
    total: int
    resumed: int
    skipped: tuple[str, ...]
    funnel: dict[str, int]


@dataclass(frozen=True)
class Options:
    """How a build runs. Apart from `exhaustive` it may change between interrupted runs.

    Attributes
    ----------
    strict
        Stop at the first image that cannot be read, instead of skipping it.
    batch_size
        Sequences per forward pass; None: chosen automatically. It is halved when memory runs out.
    exhaustive
        Run every probe on every candidate token, and write their values to `probes.jsonl`. This is slow and serves
        analysis only; the prototypes are the same.
    progress
        Called before the first image, after each image, and at the end.
    engine
        Probes the images; by default one after the other in this process.
    """

    strict: bool = False
    batch_size: int | None = None
    exhaustive: bool = False
    progress: Callable[[Progress], None] = field(default=lambda state: None)
    engine: Engine = field(default=lambda worker, names: map(worker, names))


@dataclass
class Worker:
    """Callable that reads and probes an image, given its name."""

    model: Model
    processor: Processor
    source: Source
    settings: Settings
    options: Options

    def __post_init__(self) -> None:
        self.family = models.family(self.model)
        grid = self.family.grid(self.model)
        self.prober = Prober.of(self.model, self.processor, self.settings.prompt, grid, self.options.batch_size)

    def __call__(self, name: str) -> Outcome:
        digest = GONE
        try:
            data = self.source.find(name)
            digest = hashlib.sha256(data).hexdigest()
            pixels = self.family.view(self.processor, decode_image(data))
        except Exception as error:  # whatever a processor makes of an odd picture, the others are still to be probed
            return name, digest, getattr(error, "strerror", None) or one_line(error)  # no paths of this machine
        return name, digest, self.probe(pixels)

    def probe(self, pixels: Tensor) -> Survivors:
        try:
            return survivors(
                pixels, self.model, self.family, self.prober, self.settings, exhaustive=self.options.exhaustive
            )
        except torch.OutOfMemoryError:  # in the vision tower, which sees one image at a time
            raise CodebookError(
                "out of memory with one image: take a smaller --dtype or another device and run again, finished "
                "images are kept"
            ) from None
