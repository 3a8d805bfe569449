"""The journal of a run: every finished piece of work, so that a run that was stopped goes on where it was.

One line of JSON per record, appended and synced, and one safetensors file per tensor. A kill at any moment loses at
most the record that was being written. A database in write-ahead mode was tried first: it is no more durable, does not
work on network file systems, where the parts of a benchmark on several machines write side by side, and reading a
foreign one is riskier than reading JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from typing_extensions import TypedDict

from codebook.errors import CodebookError
from codebook.store.files import (
    BLOCKS_NOT,
    LARGEST_LINES,
    LARGEST_TENSORS,
    NOT_FOLLOWED,
    cannot_write,
    locked,
    one_line,
    read_bytes,
    remove_stale,
    write_files,
)

KEPT = "what is finished is kept: "


class _Head(TypedDict):
    about: dict[str, Any]


class _Entry(TypedDict):
    name: str
    value: Any
    tensor: NotRequired[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    crc: NotRequired[str]


_HEAD, _ENTRY = TypeAdapter(_Head), TypeAdapter(_Entry)


class Journal:
    """Records by name, in memory and, unless `file` is None, in a file that the next run reads.

    Use it in a `with` statement. While it is open no other process can write the file; others may read it, also while
    it grows. A journal that is closed without a record leaves no file behind.

    Parameters
    ----------
    file
        Where records are appended; made with its folder. Tensors lie beside it, in a folder of that name.
    about
        What the records depend on, as JSON. A file about something else is refused.
    others
        Files of other parts of the work, which may still be growing: their records are read, none is added.
    output
        What the user names to put the journal elsewhere, for the errors' text.

    Attributes
    ----------
    records : dict
        The values by their names, in the order in which they were first added.

    Raises
    ------
    CodebookError
        If a file is no journal, is damaged, is about something else, or is being written by another process.
    """

    def __init__(
        self, file: Path | None, about: dict[str, Any], others: Iterable[Path] = (), *, output: str = "file"
    ) -> None:
        self.about = json.loads(json.dumps(about))
        self.file, self.records = file, dict[str, Any]()
        self._remedy = f"choose another {output}, or delete it"
        self._tensors: dict[str, str] = {}
        self._end = -1  # of the whole lines in the file; until that is known, nothing may be written or removed
        self._handle: int | None = None
        for other in others:
            try:
                data = read_bytes(other, LARGEST_LINES)
            except OSError as error:
                raise CodebookError(f"cannot read {other}: {error.strerror}; {self._remedy}") from None
            self._take(other, data)
        if file is not None:
            try:
                self._open(file)
            except OSError as error:
                self.close()
                raise cannot_write(file, error) from None
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self.records

    def __getitem__(self, name: str) -> Any:
        return self.records[name]

    def add(self, name: str, value: Any, tensor: Tensor | None = None) -> None:
        """Keep a record, a value of JSON and perhaps a tensor; both are safe once this returns."""
        record = {"name": name, "value": value}
        if self.file is not None:
            try:
                if tensor is not None:
                    record["tensor"] = self._write_tensor(tensor)
                if self._end == 0:
                    self._write({"about": self.about})
                self._write({**record, "crc": _checksum(record)})
                assert self._handle is not None
                os.fsync(self._handle)
            except OSError as error:
                raise cannot_write(self.file, error, KEPT) from None
        self.records[name] = value

    def tensor(self, name: str) -> Tensor:
        """The tensor of a record that was added with one."""
        digest = self._tensors[name]
        path = self.parts / f"{digest}.safetensors"
        try:
            data = read_bytes(path, LARGEST_TENSORS)
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("its SHA-256 is another")
            return load(data)["tensor"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CodebookError(f"{path} is damaged ({one_line(error)}): {self._remedy}") from None

    @property
    def parts(self) -> Path:
        """The folder of the records' tensors."""
        assert self.file is not None
        return self.file.with_suffix(".parts")

    def close(self) -> None:
        """Let others write the file; it stays for the next run."""
        if self._handle is None:
            return
        if self._end == 0 and self.file is not None:
            self.file.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None

    def remove(self) -> None:
        """Close the journal and delete its files."""
        assert self.file is not None
        self.file.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)
        self._end = 0
        self.close()

    def _open(self, file: Path) -> None:
        """Lock the file, take in its records, and cut off a line that a kill left half written."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(file.lstat().st_mode):
                raise CodebookError(f"{file} is there and no regular file: {self._remedy}")
        while True:
            self._handle = os.open(file, os.O_RDWR | BLOCKS_NOT | os.O_CREAT | os.O_APPEND | NOT_FOLLOWED, 0o666)
            if not locked(self._handle):
                os.close(self._handle)
                self._handle = None
                raise CodebookError(f"another run is writing {file}: wait for it, or choose another output")
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._handle), file.stat()):
                    break
            os.close(self._handle)  # whoever held the lock has removed the file since it was opened
        self._end = self._take(file, read_bytes(file, LARGEST_LINES))
        os.truncate(file, self._end)
        if self.parts.is_dir():
            remove_stale(self.parts)

    def _take(self, file: Path, data: bytes) -> int:
        """Take in the records of a file's contents; how many bytes of them are whole lines."""
        whole = data[: data.rfind(b"\n") + 1]
        head = json.dumps({"about": self.about}).encode()
        if not whole and head.startswith(data):  # killed while the first line was written
            return 0
        try:
            first, *lines = whole.split(b"\n")[:-1]
            other = _HEAD.validate_json(first)["about"]
            entries = [_intact(dict(_ENTRY.validate_json(line))) for line in lines]
        except ValueError:
            raise CodebookError(f"{file} is no journal, or damaged: {self._remedy}") from None
        if other != self.about:
            what = differences(other, self.about)
            raise CodebookError(f"{file} is from a run with another {what}: {self._remedy}")
        self.records |= {entry["name"]: entry["value"] for entry in entries}
        self._tensors |= {entry["name"]: entry["tensor"] for entry in entries if "tensor" in entry}
        return len(whole)

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._handle is not None and self.file is not None
        data = memoryview(json.dumps(entry).encode() + b"\n")
        end = self._end + len(data)
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except BaseException:
            os.truncate(self.file, self._end)  # a full disk takes half a line, and the next must not follow that
            raise
        self._end = end
        if "tensor" in entry:
            self._tensors[entry["name"]] = entry["tensor"]

    def _write_tensor(self, tensor: Tensor) -> str:
        """Write a tensor's file, whose name is its contents' digest: one that is there is never changed."""
        data = save({"tensor": tensor.contiguous()})
        digest = hashlib.sha256(data).hexdigest()
        self.parts.mkdir(exist_ok=True)
        write_files(self.parts, {f"{digest}.safetensors": data})
        return digest


def _checksum(record: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record).encode()):08x}"


def _intact(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry whose checksum is right, without it; entries of earlier versions have none."""
    checksum = entry.pop("crc", None)
    if checksum is not None and checksum != _checksum(entry):
        raise ValueError("a record differs from its checksum")
    return entry


def differences(a: Any, b: Any) -> str:
    """Names of the entries in which two records of what a run depends on differ; of `settings`, those inside."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return "purpose"
    flat_a, flat_b = (_flat(record) for record in (a, b))
    return ", ".join(k for k in flat_b if flat_a.get(k) != flat_b[k]) or "purpose"


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    settings = record.get("settings")
    inner = settings if isinstance(settings, dict) else {}
    return {**record, **inner, "settings": None if isinstance(settings, dict) else settings}
