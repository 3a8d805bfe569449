"""What can be known to fail before a model is loaded: outputs that cannot be written, folders without a codebook."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from codebook.errors import CodebookError
from codebook.store.files import cannot_write
from codebook.store.folder import CARD, CONFIG, PROTOTYPES, PROVENANCE

CODEBOOK_FILES = (CONFIG, PROTOTYPES, PROVENANCE, CARD)
"""Files of a codebook's folder that a build writes."""
BESIDE = ".sqlite-journal"
"""Longest ending that is added to an output's name, for the journal beside it and SQLite's own files."""


def check_output_file(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output that could not be written, or that would replace one of the inputs.

    Raises
    ------
    CodebookError
        If the path is a folder, a device, a FIFO or a link, too long, or in a folder that is missing or closed.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except OSError as error:
        raise cannot_write(path, error) from None
    if stat.S_ISDIR(mode):
        raise CodebookError(f"{path} is a folder: name a file")
    if not stat.S_ISREG(mode):
        raise CodebookError(f"{path} is not a regular file, and would be replaced: name another file")
    if not path.parent.is_dir():
        raise CodebookError(f"no folder {path.parent}: create it first")
    _check_names(path.with_name(path.name + BESIDE), path.parent)
    _check_writable(path.parent)
    for given in inputs:
        with contextlib.suppress(OSError):
            if path.samefile(given):
                raise CodebookError(f"{path} is an input, and would be replaced: name another file")


def check_output_picture(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse, as `check_output_file`, a picture that could not be written, or whose name says that it is no PNG."""
    from codebook.building.sources import SUFFIXES

    if path.suffix.lower() in SUFFIXES - {".png"}:
        raise CodebookError(f"pictures are written as PNG: name {path.with_suffix('.png')} instead of {path}")
    check_output_file(path, inputs)


def check_output_folder(path: Path, files: Iterable[str] = ()) -> None:
    """Refuse a folder that could not be written or made, or in which one of `files` could not be replaced.

    Raises
    ------
    CodebookError
        If the path or a part of it is a file, too long, or in a folder that is closed.
    """
    there = path
    try:
        while not os.path.lexists(there) and there != there.parent:
            there = there.parent
        if not there.is_dir():
            raise CodebookError(f"{there} is a file: name a folder")
    except OSError as error:
        raise cannot_write(path, error) from None
    _check_names(path, there)
    _check_writable(there)
    if there == path:
        for name in files:
            check_output_file(path / name)


def check_codebook(codebook: Path | None, model: str | None, pull: bool) -> None:
    """Refuse a codebook that is not on this machine, before a model is loaded; None stands for the model's own.

    Parameters
    ----------
    codebook
        A folder, or a name that `codebook list` shows.
    model
        The model to be loaded.
    pull
        Fetch what is not on this machine: the one that is named, or the registry's for the model.

    Raises
    ------
    CodebookError
        If there is none of that name, or it cannot be fetched.
    """
    from codebook.cli.output import fetching_progress
    from codebook.store.known import find_named
    from codebook.store.registry import entry_for

    entry = entry_for(model) if codebook is None and model is not None and pull else None
    name = codebook or (Path(entry.name) if entry else None)
    if name is None:
        return
    try:
        find_named(name)
    except CodebookError:
        if not pull:
            raise
        from codebook.store.fetching import pull as fetch

        with fetching_progress(name.as_posix()) as tick:
            fetch(name.as_posix(), tick=tick)


def _check_names(path: Path, there: Path) -> None:
    """Refuse a path with a name longer than the file system of its existing part takes."""
    try:
        longest = os.pathconf(there, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):  # not on Windows
        longest = 255
    if any(len(os.fsencode(part)) > longest for part in path.parts):
        raise CodebookError(f"the name of {path} is too long: choose a shorter one")


def _check_writable(folder: Path) -> None:
    """Write a file without a name: permissions alone say nothing about root, read-only disks or /proc."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(folder, error) from None
