"""The journal of a run: every finished piece of work, so that a run that was stopped goes on where it was.

Records are JSON in an SQLite database in write-ahead mode (sqlitedict), each tensor is a safetensors file beside it. A
kill at any moment loses at most the record that was being written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from codebook import __version__
from codebook.errors import CodebookError, one_line, remedy_for
from codebook.store.database import (
    MAGIC,
    Database,
    copied,
    delete_database,
    entry_of,
    files_of,
    magic,
    read_entries,
    system_error,
)
from codebook.store.files import NOT_FOLLOWED, cannot_write, check_regular, remove_stale, write_files
from codebook.store.locks import locked
from codebook.store.reading import read_tensor_bytes

KEPT = "what is finished is kept: "
"""What an error says before its remedy."""


class Journal:
    """Records by name, in memory and, unless `file` is None, in a database that the next run reads.

    Use it in a `with` statement. While it is open no other process can write the database; others may read it, also
    while it grows. A journal that is closed without a record leaves neither a file nor a folder behind.

    Parameters
    ----------
    file
        The database, a `.sqlite` file; made with its folder. Tensors lie beside it, in a folder of that name.
    about
        What the records depend on, as JSON. A database about something else is refused, and one that another version
        of this package has written: its methods may choose other tokens.
    others
        Databases of other parts of the work, which may still be growing: their records are read, none is added.
    output
        What the user names to put the journal elsewhere, for the errors' text.

    Attributes
    ----------
    records : dict
        The values by their names.

    Raises
    ------
    CodebookError
        If a file is no journal, is damaged, is about something else, or is being written by another process.
    """

    def __init__(
        self, file: Path | None, about: dict[str, Any], others: Iterable[Path] = (), *, output: str = "file"
    ) -> None:
        self.about = json.loads(json.dumps({**about, "version": __version__}))
        self.file, self.records = file, dict[str, Any]()
        self._remedy = f"choose another {output}, or delete it"
        self._tensors: dict[str, str] = {}
        self._made: list[Path] = []  # folders, the innermost first
        self._begun: bool | None = None  # whether the file has records; until that is known, it is never removed
        self._lock: int | None = None
        self._database: Database | None = None
        for other in others:
            self._take_other(other)
        if file is not None:
            try:
                self._open(file)
            except (OSError, sqlite3.Error) as error:
                self.close()
                raise self._failure(error) from None
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
        """Keep a record, a value of JSON and perhaps a tensor; no kill can lose either once this returns."""
        digest = None
        if self.file is not None:
            try:
                digest = None if tensor is None else self._write_tensor(tensor)  # before the record that names it
                self._commit(name, value, digest)
            except (OSError, sqlite3.Error) as error:
                self._disconnect()  # with what is left of the transaction; the next record opens the database again
                raise self._failure(error, KEPT) from None
        self.records[name] = value
        if digest is not None:
            self._tensors[name] = digest

    def tensor(self, name: str) -> Tensor:
        """The tensor of a record that was added with one."""
        digest = self._tensors.get(name, "missing")
        path = self.parts / f"{digest}.safetensors"
        data = read_tensor_bytes(path, self._remedy)
        try:
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("its SHA-256 is another")
            return load(data)["tensor"]
        except (ValueError, KeyError, SafetensorError) as error:
            raise CodebookError(f"{path} is damaged ({one_line(error)}): {self._remedy}") from None

    @property
    def parts(self) -> Path:
        """The folder of the records' tensors."""
        assert self.file is not None
        return self.file.with_suffix(".parts")

    def close(self) -> None:
        """Let others write the database; it stays for the next run."""
        if self._lock is None:
            return
        assert self.file is not None
        self._disconnect()
        if self._begun is False:
            delete_database(self.file)
        with contextlib.suppress(OSError):
            _lock_of(self.file).unlink()  # before it is let go: whoever waits for it looks whether it is there
        if self._begun is False:
            with contextlib.suppress(OSError):  # as of one that holds something else by now
                for folder in self._made:
                    folder.rmdir()
        os.close(self._lock)
        self._lock = None

    def remove(self) -> None:
        """Close the journal and delete its files."""
        assert self.file is not None
        self._disconnect()
        delete_database(self.file)
        shutil.rmtree(self.parts, ignore_errors=True)
        self.close()

    # Writing

    def _open(self, file: Path) -> None:
        """Lock the database and take in its records. One that is not there yet is made with the first record."""
        self._made = [folder for folder in file.parents if not folder.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        self._check(file)
        self._lock = self._hold(_lock_of(file))
        self._begun = self._take(file, file)
        if file.exists():
            self._connect()
        if self.parts.is_dir():
            remove_stale(self.parts)

    def _hold(self, path: Path) -> int:
        """An open handle of the lock's file, which no other process can lock until it is closed."""
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | NOT_FOLLOWED, 0o666)
            try:
                if not locked(handle):
                    raise CodebookError(f"another run is writing {self.file}: wait for it, or choose another output")
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(handle), path.lstat()):
                        return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # whoever held the lock has removed the file since it was opened

    def _connect(self) -> Database:
        assert self.file is not None
        self._database = Database(self.file)
        return self._database

    def _disconnect(self) -> None:
        if self._database is None:
            return
        try:
            self._database.close()
        except (OSError, sqlite3.Error):  # nothing is lost: every record was committed when it was added
            self._database.abandon()
        self._database = None

    def _commit(self, name: str, value: Any, digest: str | None) -> None:
        assert self._lock is not None
        database = self._connect() if self._database is None else self._database
        if not self._begun:
            database[None] = entry_of(None, self.about)
        database[name] = entry_of(name, value, digest)
        database.commit(blocking=True)
        self._begun = True

    def _write_tensor(self, tensor: Tensor) -> str:
        """Write a tensor's file, whose name is its contents' digest: one that is there is never changed."""
        data = save({"tensor": tensor.contiguous()})
        digest = hashlib.sha256(data).hexdigest()
        self.parts.mkdir(exist_ok=True)
        write_files(self.parts, {f"{digest}.safetensors": data})
        return digest

    # Reading

    def _check(self, file: Path) -> None:
        """Refuse what is no database before SQLite opens it, and a journal of the version that wrote JSON lines."""
        for path in (*files_of(file), _lock_of(file)):
            check_regular(path, self._remedy)
        earlier = file.with_suffix(".jsonl")
        if earlier.is_file() and magic(earlier).startswith(b'{"about"'):
            raise CodebookError(f"{earlier} is a journal of an earlier version: {self._remedy}")
        if file.exists() and magic(file) not in (b"", MAGIC):
            raise self._damaged(file)

    def _take(self, file: Path, database: Path) -> bool:
        """Take in the records of a file's database, or of a copy of it; whether there are any."""
        try:
            entries = read_entries(database)
        except sqlite3.Error as error:
            raise system_error(error) or self._damaged(file) from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._damaged(file) from None
        if not entries:
            return False
        other = entries.pop(None)["value"]
        if other != self.about:
            what = differences(other, self.about)
            raise CodebookError(f"{file} is from a run with another {what}: {self._remedy}")
        self.records |= {name: entry["value"] for name, entry in entries.items()}
        self._tensors |= {name: entry["tensor"] for name, entry in entries.items() if entry["tensor"] is not None}
        return True

    def _take_other(self, file: Path) -> None:
        try:
            self._check(file)
            with copied(file) as copy:
                self._take(file, copy)
        except FileNotFoundError:  # closed without a record since its folder was listed
            pass
        except OSError as error:
            raise CodebookError(f"cannot read {file}: {error.strerror}; {remedy_for(error, self._remedy)}") from None

    # Errors

    def _damaged(self, file: Path) -> CodebookError:
        return CodebookError(f"{file} is no journal, or damaged: {self._remedy}")

    def _failure(self, error: OSError | sqlite3.Error, kept: str = "") -> CodebookError:
        assert self.file is not None
        system = error if isinstance(error, OSError) else system_error(error)
        return self._damaged(self.file) if system is None else cannot_write(self.file, system, kept)


def _lock_of(file: Path) -> Path:
    """The lock of the run that writes a database."""
    return file.with_name(file.name + "-lock")


def differences(a: Any, b: Any) -> str:
    """Names of the entries in which two records of what a run depends on differ; of `settings`, those inside."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return "purpose"
    flat_a, flat_b = (_flat(record) for record in (a, b))
    return ", ".join(dict.fromkeys(k[-1] for k in flat_b if flat_a.get(k) != flat_b[k])) or "purpose"


def _flat(record: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """The entries by their names, and those of `settings` by that word and theirs: both may have a `pad`."""
    settings = record.get("settings")
    inner = settings if isinstance(settings, dict) else {}
    outer = {(k,): v for k, v in record.items() if not (inner and k == "settings")}
    return outer | {("settings", k): v for k, v in inner.items()}
