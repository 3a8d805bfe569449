"""Files written safely: whole or not at all, and never over what is not a regular file."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codebook.errors import CodebookError, one_line, remedy_for
from codebook.store.locks import locked
from codebook.store.reading import BLOCKS_NOT

TEMPORARY = ".codebook-"
"""How the name of a file begins that is not whole yet."""
NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder: all of them under temporary names first, then each renamed, in order.

    A full disk leaves the old files as they were. The files survive a power cut once this returns.
    """
    with contextlib.ExitStack() as drafts:
        temporary = {name: drafts.enter_context(_draft(folder / name)) for name in files}
        for name, data in files.items():
            with temporary[name].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            temporary[name].replace(folder / name)
        _sync(folder)


def write_text(path: Path, text: str) -> None:
    """Write one file of text, as `write_files` does; what is no UTF-8, as in the name of a file, becomes an escape."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path | str, value: Any) -> None:
    """Write one line of JSON to a file of its own, whole or not at all.

    Raises
    ------
    CodebookError
        If the file cannot be written.
    """
    content = json.dumps(value) + "\n"  # before anything is touched
    try:
        write_text(Path(path), content)
    except OSError as error:
        raise cannot_write(Path(path), error) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when all went well, and leaves nothing behind otherwise."""
    remove_stale(path.parent)
    with _draft(path) as temporary:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder; those of living ones are locked."""
    for path in folder.glob(f"{TEMPORARY}*.tmp"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR | NOT_FOLLOWED | BLOCKS_NOT)
            try:
                if stat.S_ISREG(os.fstat(handle).st_mode) and locked(handle):
                    path.unlink()
            finally:
                os.close(handle)


def check_regular(path: Path, remedy: str = "choose another name") -> None:
    """Refuse what is there and no regular file, as a link or a device: it is neither replaced nor opened."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CodebookError(f"{path} is there and no regular file: {remedy}")


def cannot_write(path: Path, error: OSError, kept: str = "") -> CodebookError:
    """The error for a file that cannot be written, with a remedy that fits the reason.

    Parameters
    ----------
    kept
        What is safe all the same, for the error's text.
    """
    return CodebookError(f"cannot write {path}: {error.strerror or one_line(error)}; {kept}{remedy_for(error)}")


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, for its next contents; removed at the end if it is still there.

    Its name is random and must be new, so that no link can wait under it. It has the permissions of a file that is
    simply opened, and stays locked: `remove_stale` sees by that which temporary files nobody writes any more.
    """
    check_regular(path)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}.tmp")
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | NOT_FOLLOWED, 0o666)
    except FileNotFoundError:
        raise CodebookError(f"no folder {path.parent}: create it first") from None
    try:
        with contextlib.suppress(OSError):  # without locks, what a kill leaves is not recognised
            locked(handle)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _sync(folder: Path) -> None:
    """Put a folder's new names on disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
