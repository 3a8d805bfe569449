"""What `build`, `extend` and `merge` share: where and how images are probed, and what a new codebook holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codebook import building, models
from codebook.cli.checks import check_dtype
from codebook.cli.output import note
from codebook.errors import CodebookError, printable
from codebook.models.base import Model, Processor
from codebook.models.loading import check_device
from codebook.store.codebook import Codebook


@dataclass(frozen=True)
class Probing:
    """Where and how images are probed, in the command line's words."""

    limit: int | None = None
    strict: bool = False
    batch: int | None = None
    device: str | None = None
    dtype: str | None = None
    exhaustive: bool = False
    engine: str = "local"
    address: str | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        if self.engine not in ("local", "ray"):
            raise CodebookError(f"no engine {self.engine!r}: use local or ray")
        check_dtype(self.dtype)

    def load(self, name: str) -> tuple[Model, Processor]:
        return models.load(name, self.device, None if self.dtype is None else getattr(torch, self.dtype))

    def options(self, name: str, images: Path, settings: building.Settings) -> dict[str, Any]:
        """Keyword arguments of `building.build` and `building.extend`."""
        options: dict[str, Any] = {"batch_size": self.batch, "exhaustive": self.exhaustive}
        if self.engine == "ray":
            from codebook.building.on_ray import ray_engine
            from codebook.building.worker import Worker

            def make() -> Worker:
                source = building.open_images(images, self.limit)
                return Worker(*self.load(name), source, settings, building.Options(**options))

            gpus = 1 if check_device(self.device).startswith("cuda") else 0
            engine = ray_engine(make, self.workers, self.address, gpus)
            return options | {"strict": self.strict, "engine": engine}
        return options | {"strict": self.strict}


def model_of(book: Codebook, folder: Path, named: str | None) -> str:
    """The name of the model to load for a codebook: the user's, or the codebook's own if it ships with this package.

    A codebook may come from anyone. What it says must not choose what is downloaded and loaded here.

    Raises
    ------
    CodebookError
        If the user has to name the model.
    """
    own = str(book.config["model"])
    if named is None and own not in models.SHIPPED_MODELS:
        raise CodebookError(
            f"{folder} says that it was built for {own[:80]!r}, which is loaded only if you name it: add --model NAME"
        )
    return named or own


def report_codebook(book: Codebook, out: Path, as_json: bool, source: building.Source | None = None) -> None:
    """Say what a new codebook holds, and which images were left out."""
    used = book.config["images"]
    for skipped in used["skipped"]:
        note(f"skipped unreadable image: {skipped}")
    if duplicates := used.get("duplicates"):
        note(f"counted once: {duplicates} files are exact copies of others")
    if source is not None and source.left_out:
        note(f"left out, not readable as images: {building.left_out_words(source.left_out)}")
    if as_json:
        print(json.dumps({"folder": str(out), "prototypes": len(book), "funnel": book.config["funnel"], **used}))
    else:
        print(printable(f"{len(book)} prototypes from {used['used']} images in {out}"))
