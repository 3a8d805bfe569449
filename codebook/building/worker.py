"""Probing one image of a build: what runs in this process, or on each actor of a cluster."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from codebook import models
from codebook.building.cascade import Survivors, survivors
from codebook.building.presets import Settings
from codebook.building.probes import Prober, pad_token
from codebook.building.sources import GONE, Source
from codebook.errors import CodebookError, one_line
from codebook.models import Model, Processor
from codebook.models.evaluating import check_evaluating
from codebook.store.folder import TokenRecord
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
    phase
        `pilot` while the images of a pilot are probed, else `build`.
    note
        What has just been found out, in one line; mostly empty.
    """

    done: int
    total: int
    resumed: int
    skipped: tuple[str, ...]
    funnel: dict[str, int]
    phase: str = "build"
    note: str = ""


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


@dataclass(frozen=True)
class ImageTask:
    """What is to be done with every image.

    Attributes
    ----------
    settings, exhaustive
        As in `codebook.building.cascade.survivors`.
    known
        What a pilot found, by the digests of its images: `survivors` says how it is used.
    """

    settings: Settings
    exhaustive: bool = False
    known: Mapping[str, Sequence[TokenRecord]] = field(default_factory=dict)


@dataclass
class Worker:
    """Callable that reads and probes an image, given its name.

    Attributes
    ----------
    task : ImageTask
        What it does with an image. Engines give their own workers the task of the one that they are called with.
    """

    model: Model
    processor: Processor
    source: Source
    settings: Settings
    options: Options

    def __post_init__(self) -> None:
        check_evaluating(self.model)
        self.family = models.family(self.model)
        grid = self.family.grid(self.model)
        self.pad = pad_token(self.model, self.processor, self.settings.pad)
        self.prober = Prober.of(
            self.model, self.processor, self.settings.prompt, grid, self.options.batch_size, pad=self.pad
        )
        self.task = ImageTask(self.settings, self.options.exhaustive)

    def __call__(self, name: str) -> Outcome:
        digest = GONE
        try:
            data = self.source.find(name)
            digest = hashlib.sha256(data).hexdigest()
            pixels = self.family.view(self.processor, decode_image(data))
        except Exception as error:  # whatever a processor makes of an odd picture, the others are still to be probed
            return name, digest, getattr(error, "strerror", None) or one_line(error)  # no paths of this machine
        task = self.task
        with _tower_memory():
            found = survivors(
                pixels, self.model, self.family, self.prober, task.settings, task.exhaustive, task.known.get(digest, ())
            )
        return name, digest, found

    @torch.inference_mode()
    def tokens(self, name: str) -> Tensor | None:
        """All visual tokens (n, d) of an image, raw projector outputs; None if it cannot be read."""
        try:
            pixels = self.family.view(self.processor, self.source.read(name))
        except Exception:  # as above
            return None
        with _tower_memory():
            projected = self.family.image_features(self.model, pixels.to(self.model.device, self.model.dtype))[0][0]
        return projected[:, : self.model.config.get_text_config().hidden_size].float()


@contextlib.contextmanager
def _tower_memory() -> Iterator[None]:
    """A context in which running out of memory is an error for people: the vision tower sees one image at a time."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise CodebookError(
            "out of memory with one image: take a smaller --dtype or another device and run again, finished images "
            "are kept"
        ) from None
