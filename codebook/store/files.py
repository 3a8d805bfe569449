"""Files read and written safely: whole or not at all, and never what is not a regular file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codebook.errors import CodebookError, remedy_for

TEMPORARY = ".codebook-"
"""How the name of a file begins that is not whole yet."""
NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0)


# Reading


def read_json(path: Path, remedy: str = "restore the file, or rebuild with `codebook build`") -> Any:
    """The JSON value that a file holds.

    Parameters
    ----------
    remedy
        What to do about a file that holds none, for the error's text.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CodebookError(f"no {path.name} in {path.parent}: {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CodebookError(f"cannot read {path}: {one_line(error)}; {remedy}") from None


def read_lines(path: Path, remedy: str) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file with one a line (JSONL), each with the number of its line; blank lines hold none.

    A line that is not JSON gives None, which is no line's form either: the caller's check of the form then names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CodebookError(f"cannot read {path}: {one_line(error)}; {remedy}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise CodebookError(
            f"no {path.name} in {path.parent}: restore the file, or rebuild with `codebook build`"
        ) from None
    except OSError as error:
        raise CodebookError(f"cannot read {path}: {error.strerror}; check the file") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# Writing


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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when all went well, and leaves nothing behind otherwise."""
    remove_stale(path.parent)
    with _draft(path) as temporary:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder; those of living ones are locked."""
    for path in folder.glob(f"{TEMPORARY}*.tmp"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            if locked(file.fileno()):
                path.unlink()


def locked(handle: int) -> bool:
    """Lock an open file for this process until the file is closed, or the process killed; False if another has it.

    On Windows nothing is locked, and two runs that write the same files must not go at once.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        return False
    return True


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
    simply opened, and stays locked: `remove_stale` tells by that which temporary files nobody writes any more.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CodebookError(f"{path} is there and no plain file: choose another name")
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}.tmp")
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | NOT_FOLLOWED, 0o666)
    except FileNotFoundError:
        raise CodebookError(f"no folder {path.parent}: create it first") from None
    try:
        locked(handle)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)
