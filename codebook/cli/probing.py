"""What `build`, `extend` and `merge` share: where and how images are probed, and what a new codebook holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from codebook import building, models
from codebook.building.pool import ImageRecord
from codebook.cli.options import Loading, Probing
from codebook.cli.output import note
from codebook.errors import CodebookError, counted, printable
from codebook.store.codebook import Codebook
from codebook.store.folder import IMAGE_RECORDS, read_folder
from codebook.store.parsing import parse_lines


def build_options(
    probing: Probing, loading: Loading, name: str, images: Path, exhaustive: bool = False
) -> dict[str, Any]:
    """Keyword arguments of `building.build` and `building.extend`.

    Raises
    ------
    CodebookError
        If they are to run on Ray, and it is not installed or not reached.
    """
    options: dict[str, Any] = {"batch_size": probing.batch, "exhaustive": exhaustive}
    if probing.engine == "local":
        return options | {"strict": probing.strict}
    from codebook.building.on_ray import ray_engine
    from codebook.building.worker import Worker

    def make(settings: building.Settings) -> Worker:
        source = building.open_images(images, probing.limit)
        return Worker(*loading.load(name), source, settings, building.Options(**options))

    gpus = 1 if loading.check(name).startswith("cuda") else 0
    engine = ray_engine(make, probing.workers or 2, probing.address, gpus)
    return options | {"strict": probing.strict, "engine": engine}


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


def _unread(folder: Path) -> dict[str, str]:
    """Why images of a codebook's build could not be read, by their names, where its folder says so.

    Raises
    ------
    CodebookError
        If the file is not the one that belongs to the codebook: a complete build may have lain there for long.
    """
    _, files = read_folder(folder, (IMAGE_RECORDS,))
    records = parse_lines(folder / IMAGE_RECORDS, files.get(IMAGE_RECORDS, b""), "build it again", ImageRecord)
    return {record["image"]: record["error"] for _, record in records if "error" in record}


def report_codebook(book: Codebook, out: Path, as_json: bool, source: building.Source | None = None) -> None:
    """Say what a new codebook holds, and which images were left out."""
    used = book.config["images"]
    reasons = _unread(out) if used["skipped"] else {}
    for skipped in used["skipped"]:
        why = f" ({reasons[skipped]})" if skipped in reasons else ""
        note(f"skipped unreadable image: {skipped}{why}")
    if duplicates := used.get("duplicates"):
        note(f"counted once: {duplicates} files are exact copies of others")
    if source is not None and source.left_out:
        note(f"left out, not readable as images: {building.left_out_words(source.left_out)}")
    found = {name: book.config[name] for name in ("pilot", "stability") if name in book.config}
    if "stability" in found and not building.is_stable(found["stability"]):
        note(f"not stable at {found['stability']['agreement']:g} with all images: give more, or a lower --agreement")
    if as_json:
        taus = {name: book.config["settings"][name] for name in ("tau_p", "tau_j")}
        report = {"folder": str(out), "prototypes": len(book), "funnel": book.config["funnel"], **used, **taus, **found}
        print(json.dumps(report))
    else:
        print(printable(f"{counted(len(book), 'prototype')} from {counted(used['used'], 'image')} in {out}"))
