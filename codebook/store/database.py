"""The SQLite database of a journal: how its records are written and read back, its files, and its errors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from sqlitedict import SqliteDict, SqliteMultithread

from codebook.errors import CodebookError
from codebook.store.reading import open_regular

MAGIC = b"SQLite format 3\0"
"""How a database's file begins."""

TABLE = 'CREATE TABLE "records" (key TEXT PRIMARY KEY, value BLOB)'
"""The one table of a journal: names and records, both as JSON. The name `null` has what the records depend on."""

LOG, INDEX, ROLLBACK = "-wal", "-shm", "-journal"
"""Endings of SQLite's files beside a database."""

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


def system_error(error: sqlite3.Error) -> OSError | None:
    """The error of the operating system behind one of SQLite; None if it is about what a file contains."""
    code = getattr(error, "sqlite_errorcode", 0)  # missing where Python's module is the one that complains
    return OSError(REASONS.get(code, errno.EIO), str(error)) if code & 0xFF in SYSTEM else None


def files_of(file: Path) -> list[Path]:
    """A database, and the files that SQLite makes beside it, which would be nothing without it."""
    return [file.with_name(file.name + ending) for ending in ("", LOG, INDEX, ROLLBACK)]


def delete_database(file: Path) -> None:
    """Delete a database and its files, the database first: a log alone is read by nobody."""
    for path in files_of(file):
        path.unlink(missing_ok=True)


def magic(file: Path) -> bytes:
    """The first bytes of a file, as many as `MAGIC` has."""
    with open(open_regular(file, LARGEST), "rb") as opened:
        return opened.read(len(MAGIC))


@contextlib.contextmanager
def copied(file: Path) -> Iterator[Path]:
    """A copy of a database as it was at one moment, in a folder of its own, while another process may be writing it.

    Nothing is locked, and nothing is made beside the database, so that its writer may even be on another machine. What
    is not in the database yet is in its log. The log begins anew, with another header, only when all of it is in the
    database: if the header was the same before and after both were read, they belong together, and SQLite puts in
    from the log what a half-read database lacks.
    """
    with tempfile.TemporaryDirectory(prefix="codebook-") as folder:
        copy = Path(folder, file.name)
        log, copied_log = _log(file), _log(copy)
        for _ in range(ATTEMPTS):
            before = _state(file)
            shutil.copyfile(file, copy)
            copied_log.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(log, copied_log)
            if _state(file) == before:
                break
        else:
            raise CodebookError(f"cannot read {file}: it changes too fast; try again")
        yield copy


def _log(file: Path) -> Path:
    return file.with_name(file.name + LOG)


def _state(file: Path) -> tuple[bytes, int]:
    """The header of a database's log, and where there is none, the time at which the database was last written."""
    with contextlib.suppress(FileNotFoundError), _log(file).open("rb") as log:
        if header := log.read(32):
            return header, 0
    return b"", file.stat().st_mtime_ns


def entry_of(name: str | None, value: Any, tensor: str | None = None) -> dict[str, Any]:
    """A record as it is written: a value, the digest of its tensor, and one of all that, so that no damage is read."""
    text = json.dumps([name, value, tensor])
    return {"value": value, "tensor": tensor, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_entries(file: Path) -> dict[Any, dict[str, Any]]:
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
        if entry != entry_of(name, entry["value"], entry["tensor"]):
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


class Database(SqliteDict):
    """A journal's database, open to write: names and records of JSON, in write-ahead mode."""

    def __init__(self, file: Path) -> None:
        try:
            super().__init__(
                str(file.absolute()), "records", journal_mode="WAL", encode=json.dumps, decode=json.loads,
                encode_key=json.dumps, decode_key=json.loads, outer_stack=False,
            )  # fmt: skip
            # sqlitedict turns syncing off. NORMAL loses nothing to a kill, and a power cut leaves a whole database.
            self.conn.execute("PRAGMA synchronous=NORMAL")
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
