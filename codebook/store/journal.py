"""The journal of a run: every finished piece of work, so that a run that was stopped goes on where it was.

Records are JSON in an SQLite database in write-ahead mode (sqlitedict), each tensor is a safetensors file beside it. A
kill at any moment loses at most the record that was being written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from sqlitedict import SqliteDict, SqliteMultithread
from torch import Tensor

from codebook import __version__
from codebook.errors import CodebookError, one_line, remedy_for
from codebook.store.files import (
    NOT_FOLLOWED,
    cannot_write,
    check_regular,
    locked,
    open_regular,
    read_tensor_bytes,
    remove_stale,
    write_files,
)

KEPT = "what is finished is kept: "
MAGIC = b"SQLite format 3\0"
"""How a database's file begins."""
TABLE = 'CREATE TABLE "records" (key TEXT PRIMARY KEY, value BLOB)'
"""The one table of a journal: names and records, both as JSON. The name `null` has what the records depend on."""
LOG, INDEX, ROLLBACK, LOCK = "-wal", "-shm", "-journal", "-lock"
"""Endings of the files beside a database: three of SQLite's, and the lock of the run that writes."""
REASONS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR_WRITE: errno.ENOSPC,  # as by a quota
    sqlite3.SQLITE_IOERR_SHMSIZE: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EACCES,
    sqlite3.SQLITE_PROTOCOL: errno.ENOLCK,
    sqlite3.SQLITE_IOERR_LOCK: errno.ENOLCK,
    sqlite3.SQLITE_IOERR_RDLOCK: errno.ENOLCK,
    sqlite3.SQLITE_IOERR_SHMLOCK: errno.ENOLCK,
    sqlite3.SQLITE_IOERR_SHMMAP: errno.ENOLCK,
}
"""The system's error that an SQLite code most likely stands for: SQLite does not tell it."""
SYSTEM = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_PROTOCOL,
}  # fmt: skip
"""Classes of SQLite's codes (their last byte) that are not about what a file contains."""
LARGEST = 2**36
"""Bytes of a database that is opened."""
WAIT = 0.2
"""Seconds between looks at whether the database's thread is still alive."""
ATTEMPTS = 100
"""How often a growing database is copied before giving up."""

# sqlitedict logs a stack before every error that it raises as well.
logging.getLogger("sqlitedict").setLevel(logging.CRITICAL)


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
        self._database: _Database | None = None
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
            _delete(self.file)
        with contextlib.suppress(OSError):
            _beside(self.file, LOCK).unlink()  # before it is let go: whoever waits for it looks whether it is there
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
        _delete(self.file)
        shutil.rmtree(self.parts, ignore_errors=True)
        self.close()

    # Writing

    def _open(self, file: Path) -> None:
        """Lock the database and take in its records. One that is not there yet is made with the first record."""
        self._made = [folder for folder in file.parents if not folder.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        self._check(file)
        self._lock = self._hold(_beside(file, LOCK))
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

    def _connect(self) -> _Database:
        assert self.file is not None
        self._database = _Database(
            str(self.file.absolute()), "records", journal_mode="WAL", encode=json.dumps, decode=json.loads,
            encode_key=json.dumps, decode_key=json.loads, outer_stack=False,
        )  # fmt: skip
        # sqlitedict turns syncing off. NORMAL loses nothing to a kill, and a power cut leaves a whole database.
        self._database.conn.execute("PRAGMA synchronous=NORMAL")
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
            database[None] = _entry(None, self.about)
        database[name] = _entry(name, value, digest)
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
        for path in (file, *(_beside(file, ending) for ending in (LOG, INDEX, ROLLBACK, LOCK))):
            check_regular(path, self._remedy)
        earlier = file.with_suffix(".jsonl")
        if earlier.is_file() and _magic(earlier).startswith(b'{"about"'):
            raise CodebookError(f"{earlier} is a journal of an earlier version: {self._remedy}")
        if file.exists() and _magic(file) not in (b"", MAGIC):
            raise self._damaged(file)

    def _take(self, file: Path, database: Path) -> bool:
        """Take in the records of a file's database, or of a copy of it; whether there are any."""
        try:
            entries = _entries(database)
        except sqlite3.Error as error:
            raise _system_error(error) or self._damaged(file) from None
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
            with _copied(file) as copy:
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
        system = error if isinstance(error, OSError) else _system_error(error)
        return self._damaged(self.file) if system is None else cannot_write(self.file, system, kept)


def _system_error(error: sqlite3.Error) -> OSError | None:
    """The error of the operating system behind one of SQLite; None if it is about what a file contains."""
    code = getattr(error, "sqlite_errorcode", 0)  # missing where Python's module is the one that complains
    return OSError(REASONS.get(code, errno.EIO), str(error)) if code & 0xFF in SYSTEM else None


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


# Files


def _beside(file: Path, ending: str) -> Path:
    return file.with_name(file.name + ending)


def _delete(file: Path) -> None:
    """Delete a database, and then its log, which would be nothing without it."""
    for ending in ("", LOG, INDEX, ROLLBACK):
        _beside(file, ending).unlink(missing_ok=True)


def _magic(file: Path) -> bytes:
    with open(open_regular(file, LARGEST), "rb") as opened:
        return opened.read(len(MAGIC))


@contextlib.contextmanager
def _copied(file: Path) -> Iterator[Path]:
    """A copy of a database as it was at one moment, in a folder of its own, while another process may be writing it.

    Nothing is locked, and nothing is made beside the database, so that its writer may even be on another machine. What
    is not in the database yet is in its log. The log begins anew, with another header, only when all of it is in the
    database: if the header was the same before and after both were read, they belong together, and SQLite puts in
    from the log what a half-read database lacks.
    """
    with tempfile.TemporaryDirectory(prefix="codebook-") as folder:
        copy, log = Path(folder, file.name), _beside(file, LOG)
        for _ in range(ATTEMPTS):
            before = _state(file)
            shutil.copyfile(file, copy)
            _beside(copy, LOG).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(log, _beside(copy, LOG))
            if _state(file) == before:
                break
        else:
            raise CodebookError(f"cannot read {file}: it changes too fast; try again")
        yield copy


def _state(file: Path) -> tuple[bytes, int]:
    """The header of a database's log, and where there is none, the time at which the database was last written."""
    with contextlib.suppress(FileNotFoundError), _beside(file, LOG).open("rb") as log:
        if header := log.read(32):
            return header, 0
    return b"", file.stat().st_mtime_ns


# The database


def _entry(name: str | None, value: Any, tensor: str | None = None) -> dict[str, Any]:
    """A record as it is written: a value, the digest of its tensor, and one of all that, so that no damage is read."""
    text = json.dumps([name, value, tensor])
    return {"value": value, "tensor": tensor, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _entries(file: Path) -> dict[Any, dict[str, Any]]:
    """The records of a database by their names, None for what they depend on; empty if it has none yet.

    Raises sqlite3.Error, ValueError, KeyError, TypeError or RecursionError if that is not what a journal has written.
    The database is read as data alone: JSON, from the one table that a journal has.
    """
    if not file.exists():
        return {}
    # Opened for writing, because SQLite may first have to undo or redo what a kill left half done.
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)) as database:
        schema = database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        if schema and (schema != [(TABLE,)] or database.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",)):
            raise ValueError("other tables, or damaged ones")
        rows = database.execute('SELECT key, value FROM "records" ORDER BY rowid').fetchall() if schema else []
    entries = {}
    for key, text in rows:
        name, entry = json.loads(key), json.loads(text)
        if entry != _entry(name, entry["value"], entry["tensor"]):
            raise ValueError("another digest")
        entries[name] = entry
    if rows and None not in entries:
        raise ValueError("about nothing")
    return entries


class _Connection(SqliteMultithread):
    """sqlitedict's database thread, but an error in it reaches the caller.

    The stock thread dies of a failed COMMIT, as on a full disk, and the caller waits for its reply for ever.
    """

    _opened: sqlite3.Connection | None = None

    def _connect(self) -> tuple[sqlite3.Connection, sqlite3.Cursor]:
        self._opened, cursor = super()._connect()
        return self._opened, cursor

    def run(self) -> None:
        try:
            super().run()
        except Exception:
            self.exception = sys.exc_info()
        finally:
            if self._opened is not None:
                self._opened.close()  # or its transaction would keep the database locked

    def select(self, req: str, arg: Any = None) -> Iterator[Any]:
        replies: Queue[Any] = Queue()
        self.execute(req, arg, replies)
        while True:
            alive = self.is_alive()  # asked before the queue is: what a dying thread still says is heard
            try:
                row = replies.get(timeout=WAIT)
            except Empty:
                self.check_raise_error()
                if not alive:
                    raise sqlite3.OperationalError("the database is closed") from None
                continue
            self.check_raise_error()
            if row == "--no more--":
                return
            yield row


class _Database(SqliteDict):
    def __init__(self, *args: Any, **options: Any) -> None:
        try:
            super().__init__(*args, **options)
        except BaseException:  # as on a full disk; the thread would wait for ever, and hold the files open
            self.abandon()
            raise

    def _new_conn(self) -> _Connection:
        return _Connection(self.filename, self.autocommit, self.journal_mode, self._outer_stack)

    def abandon(self) -> None:
        """Close without a commit, and wait until the files are let go."""
        connection = getattr(self, "conn", None)
        if connection is not None:
            self.close(force=True)
            connection.join()
