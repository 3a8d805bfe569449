"""Files read and written safely: whole or not at all, within limits, and never what is not a regular file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import stat
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from codebook.errors import CodebookError, one_line, quoted, remedy_for

if TYPE_CHECKING:  # lists of codebooks are made without torch, which takes a second to import
    from torch import Tensor

LARGEST_JSON = 2**24
"""Bytes of a JSON file, or of a line of a JSONL file."""
LARGEST_LINES = 2**30
"""Bytes of a JSONL file."""
LARGEST_TENSORS = 2**34
"""Bytes of a safetensors file."""

TEMPORARY = ".codebook-"
"""How the name of a file begins that is not whole yet."""
NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0)
BLOCKS_NOT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
POINTER = b"version https://git-lfs.github.com/spec/"
WRITER_PATIENCE = 10.0
"""Seconds to wait for another process that writes into the same folder."""
MARK = b"\xef\xbb\xbf"
"""Byte-order mark, with which some editors begin a file."""
CHUNK = 2**20


# Reading


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


def read_whole(path: Path, remedy: str, largest: int = LARGEST_JSON, longest_line: int | None = None) -> bytes:
    """The bytes of a file, as `read_bytes` gives them; every error is a CodebookError that ends in the remedy."""
    try:
        return read_bytes(path, largest, longest_line)
    except (FileNotFoundError, NotADirectoryError):
        raise CodebookError(f"cannot read {path}: no {path.name} in {path.parent}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise cannot_read(path, error, remedy) from None


def parse(path: Path, data: bytes, remedy: str, schema: Any) -> Any:
    """JSON of a file whose bytes are there already, checked like `read_json`."""
    try:
        return _validated(data.removeprefix(MARK), schema)
    except ValueError as error:
        raise CodebookError(f"cannot read {path}: {fault_words(error)}; {remedy}") from None


def parse_lines(path: Path, data: bytes, remedy: str, schema: Any) -> list[tuple[int, Any]]:
    """JSON lines of a file whose bytes are there already, checked like `read_lines`."""
    found = []
    for number, line in enumerate(data.removeprefix(MARK).split(b"\n"), 1):
        if line := line.strip():
            try:
                found.append((number, _validated(line, schema)))
            except ValueError as error:
                raise CodebookError(f"cannot read {path}, line {number}: {remedy} ({fault_words(error)})") from None
    return found


def parse_tensors(path: Path | str, data: bytes, remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose bytes are there already; `path` is what an error calls it."""
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CodebookError(f"cannot read {path}: {one_line(error)}; {remedy}") from None


def parse_arrays(path: Path, data: bytes, remedy: str) -> dict[str, Any]:
    """The same as arrays of NumPy, without torch; it has no bfloat16."""
    from safetensors.numpy import load

    try:
        return load(data)
    except KeyError as error:
        raise CodebookError(f"cannot read {path}: it holds numbers of type {error}; {remedy}") from None
    except (SafetensorError, ValueError, TypeError) as error:
        raise CodebookError(f"cannot read {path}: {one_line(error)}; {remedy}") from None


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


def _validated(data: bytes, schema: Any) -> Any:
    """The value of some JSON, as it is written: with the order of its keys, which the checked copy would lose.

    Raises ValueError, also for numbers that are none, under whatever key: what is written on would be no JSON.
    """
    _adapter(schema).validate_json(data, strict=True)
    return json.loads(data.decode(), parse_constant=_finite, parse_float=_finite, object_pairs_hook=each_once)


class RepeatedKeyError(ValueError):
    """A key stands twice in a JSON object: which of its values holds is not the same to every reader."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{quoted(key)} is given twice: give it once")
        self.key = key


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its keys and values, as `json.loads` calls it; raises RepeatedKeyError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def fault_words(error: ValueError) -> str:
    """The first thing that is wrong with some JSON, and where."""
    if not isinstance(error, ValidationError):
        return one_line(error)
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}"[:200] if place else first["msg"][:200]


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


@contextlib.contextmanager
def writing(folder: Path, patience: float = WRITER_PATIENCE) -> Iterator[None]:
    """Hold a folder against other writers; wait for one, but not for ever. Readers need no lock.

    Where folders cannot be locked, as on Windows and on some network file systems, nothing is held.

    Parameters
    ----------
    patience
        Seconds to wait for another writer.
    """
    with contextlib.ExitStack() as stack:
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:
            pass
        else:
            stack.callback(os.close, handle)
            until = time.monotonic() + patience
            with contextlib.suppress(OSError):
                while not locked(handle):
                    if time.monotonic() > until:
                        raise CodebookError(
                            f"another process is writing {folder}: wait for it, or choose another folder"
                        )
                    time.sleep(0.01)
        yield


def being_written(folder: Path) -> bool:
    """Whether a process holds a folder for `writing`."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            return not locked(handle)
        finally:
            os.close(handle)
    return False


def cannot_write(path: Path, error: OSError, kept: str = "") -> CodebookError:
    """The error for a file that cannot be written, with a remedy that fits the reason.

    Parameters
    ----------
    kept
        What is safe all the same, for the error's text.
    """
    return CodebookError(f"cannot write {path}: {error.strerror or one_line(error)}; {kept}{remedy_for(error)}")


def check_regular(path: Path, remedy: str = "choose another name") -> None:
    """Refuse what is there and no regular file, as a link or a device: it is neither replaced nor opened."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CodebookError(f"{path} is there and no regular file: {remedy}")


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
