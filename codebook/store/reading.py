"""Files read safely: within limits, and never what is not a regular file."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from codebook.errors import CodebookError, one_line, remedy_for
from codebook.store.parsing import parse, parse_lines

LARGEST_JSON = 2**24
"""Bytes of a JSON file, or of a line of a JSONL file."""
LARGEST_LINES = 2**30
"""Bytes of a JSONL file."""
LARGEST_TENSORS = 2**34
"""Bytes of a safetensors file."""
BLOCKS_NOT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
POINTER = b"version https://git-lfs.github.com/spec/"
CHUNK = 2**20


def is_file(path: Path) -> bool:
    """Whether a path names a file. A name that no file can have, such as one that is too long, names none."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether a path names a folder, as `is_file` tells it of files."""
    try:
        return path.is_dir()
    except OSError:
        return False


def open_regular(path: Path, largest: int) -> int:
    """Open a file for reading, following links, if it is a regular file within a limit; a handle of the system.

    Nothing else is even opened: a pipe would block, and a device may do anything. A pointer of Git LFS in the place of
    a file is named.

    Raises
    ------
    OSError, CodebookError
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise CodebookError(f"{path} is not a regular file: name one")
    handle = os.open(path, os.O_RDONLY | BLOCKS_NOT)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise CodebookError(f"{path} is not a regular file: name one")
        if found.st_size > largest:
            raise CodebookError(f"{path} has {found.st_size:,} bytes: at most {largest:,} are read")
        if os.read(handle, len(POINTER)) == POINTER:
            raise CodebookError(f"{path} is only a pointer of Git LFS: fetch the file with `git lfs pull`")
        os.lseek(handle, 0, os.SEEK_SET)
    except BaseException:
        os.close(handle)
        raise
    return handle


def read_bytes(path: Path, largest: int, longest_line: int | None = None) -> bytes:
    """The contents of a regular file within a limit.

    Parameters
    ----------
    largest, longest_line
        Bytes of the file; of a line, for files of lines. What is longer is refused before it is read.

    Raises
    ------
    OSError
        If the file cannot be read.
    CodebookError
        If `open_regular` refuses it, or it is too long.
    """
    with open(open_regular(path, largest), "rb") as file:
        chunks: list[bytes] = []
        length = line = 0
        while chunk := file.read(CHUNK):
            chunks.append(chunk)
            length += len(chunk)
            line = line + len(chunk) if b"\n" not in chunk else len(chunk) - chunk.rindex(b"\n")
            if length > largest:  # it has grown since it was opened
                raise CodebookError(f"{path} has more than {largest:,} bytes: no more are read")
            if longest_line is not None and line > longest_line:
                raise CodebookError(f"{path} has a line of more than {longest_line:,} bytes: no more are read")
        return b"".join(chunks)


def read_whole(path: Path, remedy: str, largest: int = LARGEST_JSON, longest_line: int | None = None) -> bytes:
    """The bytes of a file, as `read_bytes` gives them; every error is a CodebookError that ends in the remedy."""
    try:
        return read_bytes(path, largest, longest_line)
    except (FileNotFoundError, NotADirectoryError):
        raise CodebookError(f"cannot read {path}: no {path.name} in {path.parent}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise cannot_read(path, error, remedy) from None


def read_json(path: Path, remedy: str, schema: Any = Any, largest: int = LARGEST_JSON) -> Any:
    """The contents of a JSON file, checked.

    Parameters
    ----------
    remedy
        What to do about another file, for the error's text.
    schema
        What the JSON must look like: a type that pydantic knows, such as a TypedDict. It is checked strictly: no text
        is taken for a number.
    largest
        Bytes of the file at most.

    Raises
    ------
    CodebookError
        If the file is missing, cannot be read, or looks different. The message names the place in it.
    """
    return parse(path, read_whole(path, remedy, largest), remedy, schema)


def read_lines(path: Path, remedy: str, schema: Any = Any) -> list[tuple[int, Any]]:
    """The contents of a file with JSON on each line (JSONL), each checked like `read_json` and with the line's number.

    Lines end in a line feed and nothing else; blank ones are left out, and so is a byte-order mark.
    """
    return parse_lines(path, read_whole(path, remedy, LARGEST_LINES, LARGEST_JSON), remedy, schema)


def read_tensor_bytes(path: Path, remedy: str) -> bytes:
    """The bytes of a safetensors file within the limit.

    The header of a large file is looked at before the rest is read: one that is full of nothing is refused at once.
    """
    try:
        if is_file(path) and LARGEST_JSON < path.stat().st_size <= LARGEST_TENSORS:
            with safe_open(path, framework="pt"):
                pass
    except (OSError, SafetensorError) as error:
        raise cannot_read(path, error, remedy) from None
    return read_whole(path, remedy, LARGEST_TENSORS)


def sha256(path: Path) -> str:
    """SHA-256 of a regular file, as hexadecimal digits."""
    try:
        with open(open_regular(path, LARGEST_TENSORS), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise cannot_read(path, error, "check the file") from None


def cannot_read(what: object, error: Exception, remedy: str) -> CodebookError:
    """The error for what cannot be read.

    Parameters
    ----------
    remedy
        What to do about a file of another kind. An error of the operating system, such as a file that is closed to this
        user, has a remedy of its own.
    """
    if isinstance(error, OSError) and error.errno and error.errno in errno.errorcode:
        return CodebookError(f"cannot read {what}: {os.strerror(error.errno)}; {remedy_for(error, remedy)}")
    return CodebookError(f"cannot read {what}: {getattr(error, 'strerror', None) or one_line(error)}; {remedy}")
