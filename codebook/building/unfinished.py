"""The folder that a build writes: empty, with an unfinished build in it, or with a whole codebook."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import Any

from pydantic import TypeAdapter, ValidationError

from codebook.building.presets import read_settings
from codebook.errors import CodebookError
from codebook.store.codebook import Codebook
from codebook.store.folder import CONFIG, HORIZON_FILE, read_config
from codebook.store.journal import Journal, differences

UNFINISHED = ".build"
"""Folder inside `out` of a build's journals, until the codebook is whole."""


def requested(config: dict[str, Any], where: Path | str = "the codebook") -> dict[str, Any]:
    """A codebook's config in the words in which it was asked for: what the build itself found out is left open."""
    settings = asdict(read_settings(config["settings"], where))
    asked = {**config, "settings": settings}
    if pilot := config.get("pilot"):
        settings |= dict.fromkeys(pilot["chosen"])
        asked["pilot"] = {name: pilot[name] for name in ("images", "select")}
    if stability := config.get("stability"):
        asked["stability"] = {name: stability[name] for name in ("agreement", "given")}
    return asked


def check_folder(out: Path) -> None:
    """Refuse what is no folder, and a folder with other things than a build in it: known before there is a model.

    Raises
    ------
    CodebookError
    """
    if out.exists() and not out.is_dir():
        raise CodebookError(f"{out} is a file: choose another --out")
    begun = (out / CONFIG).exists() or (out / UNFINISHED).is_dir()
    # A horizon goes along before the codebook is whole, and stays where the disk is full then.
    if not begun and out.is_dir() and any(path.name != HORIZON_FILE for path in out.iterdir()):
        raise CodebookError(f"{out} is not empty and holds no build: choose another --out")


def finished(out: Path, asked: dict[str, Any]) -> Codebook | None:
    """The whole codebook of this very build, None if there is none yet; anything else in `out` is an error.

    Parameters
    ----------
    asked
        Entries of its config, as `requested` has them.
    """
    check_folder(out)
    if (out / CONFIG).exists():
        try:
            config = requested(read_config(out), out)
            if "language_model" not in config:  # of earlier versions
                asked = {name: value for name, value in asked.items() if name != "language_model"}
            other = {name: config[name] for name in asked}
        except (CodebookError, KeyError):
            raise CodebookError(f"{out} holds something else than a build: choose another --out") from None
        for name in ("pilot", "stability"):
            asked, other = {**asked, name: asked.get(name)}, {**other, name: config.get(name)}
        if other != asked:
            raise CodebookError(
                f"{out} holds another build's codebook (another {differences(other, asked)}): "
                "choose another --out, or delete it"
            )
        book = Codebook.load(out)
        rmtree(out / UNFINISHED, ignore_errors=True)  # killed while it was cleaning up
        return book
    return None


def open_journal(out: Path, name: str, key: dict[str, Any], kind: TypeAdapter[Any]) -> Journal:
    """A journal of an unfinished build into `out`, whose records are of a kind; one that is not whole is refused."""
    folder = out / UNFINISHED
    if folder.is_symlink():
        raise CodebookError(f"{folder} is a link: choose another --out, or delete it")
    if (folder / "key.json").exists():
        raise CodebookError(f"{out} holds an unfinished build of an earlier version: delete {folder} and run again")
    journal = Journal(folder / name, key, output="--out")
    try:
        for record in journal.records.values():
            kind.validate_python(record)
    except ValidationError:
        journal.close()
        raise CodebookError(f"the unfinished build in {folder} is damaged: delete it and run again") from None
    return journal


def forget(out: Path, journals: Iterable[Journal]) -> None:
    """Delete the journals, whatever else an unfinished build left, and `out` if it holds nothing else."""
    for journal in journals:
        journal.remove()
    rmtree(out / UNFINISHED, ignore_errors=True)
    with contextlib.suppress(OSError):
        out.rmdir()  # only if it is empty
