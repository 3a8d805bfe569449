"""Files read and written safely: whole or not at all, and never what is not a regular file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codebook.errors import CodebookError


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder: all of them to temporary names first, then each renamed, in order.

    A full disk leaves the old files as they were. A write survives a power cut once this returns.
    """
    temporary = {name: folder / f".{name}.tmp" for name in files}
    try:
        for name, data in files.items():
            with temporary[name].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            temporary[name].replace(folder / name)
    except OSError:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CodebookError(f"no {path.name} in {path.parent}: name a whole codebook folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CodebookError(
            f"cannot read {path}: {one_line(error)}; restore the file, or rebuild with `codebook build`"
        ) from None


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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when all went well, and leaves nothing behind otherwise."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except FileNotFoundError:
        raise CodebookError(f"no folder {path.parent}: create it first") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
