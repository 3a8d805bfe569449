"""The journal of a build: one record an image, written so that a kill at any moment loses at most that image."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sqlite3
import sys
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from sqlitedict import SqliteDict, SqliteMultithread
from torch import Tensor

from codebook.errors import CodebookError
from codebook.store.files import write_files

FOLDER = ".build"
WAIT = 0.2
"""Seconds between looks at whether the database's thread still lives."""

# It prints a stack before every error that it raises as well.
logging.getLogger("sqlitedict").setLevel(logging.CRITICAL)


class Journal:
    """A build's finished images, in `OUT/.build`.

    Records are JSON in an SQLite database (WAL), tensors one safetensors file an image. The tensors are on disk
    before the record that names them is committed: an image that has a record is whole.

    Parameters
    ----------
    out
        The codebook's folder to be.
    key
        What the records depend on: model and settings. A journal with another key is refused.
    """

    def __init__(self, out: Path, key: dict[str, Any]) -> None:
        self.folder = out / FOLDER
        self.parts = self.folder / "parts"
        self._lock: Any = None
        self._records: SqliteDict | None = None
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder / "lock", out)
            self._claim(out, key)
            self._records = _Records(
                str(self.folder / "journal.sqlite"), journal_mode="WAL", encode=json.dumps, decode=json.loads,
                outer_stack=False,
            )  # fmt: skip
            # sqlitedict turns syncing off; NORMAL loses nothing to a kill, and stays consistent in a power cut.
            self._records.conn.execute("PRAGMA synchronous=NORMAL")
            self.records: dict[str, dict[str, Any]] = dict(self._records.items())
        except (OSError, sqlite3.Error, ValueError) as error:
            self.close()
            raise self._failed(error) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, name: str, record: dict[str, Any], features: Tensor | None = None) -> None:
        """Store an image's record and its tensor, and return once both are safe."""
        assert self._records is not None
        try:
            if features is not None and len(features):
                write_files(self.parts, {_part(name): save({"features": features.contiguous()})})
            self._records[name] = record
            self._records.commit(blocking=True)
        except (OSError, sqlite3.Error) as error:
            raise self._failed(error) from None
        self.records[name] = record

    def features(self, name: str) -> Tensor:
        """The tensor of an image whose record says that it has one."""
        try:
            return load_file(self.parts / _part(name))["features"]
        except (OSError, SafetensorError, KeyError) as error:
            raise CodebookError(
                f"the unfinished build in {self.folder} is damaged ({error}): delete it and run again"
            ) from None

    def close(self) -> None:
        """Close the files; the journal stays for the next run."""
        if self._records is not None:
            try:
                self._records.close()
            except sqlite3.Error:  # nothing is lost: every record was committed when it was added
                self._records.close(force=True)
            self._records = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Close and delete the journal."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _claim(self, out: Path, key: dict[str, Any]) -> None:
        path = self.folder / "key.json"
        if not path.exists():
            write_files(self.folder, {path.name: json.dumps(key).encode()})
            return
        other = json.loads(path.read_text())
        if other != json.loads(json.dumps(key)):
            what = differences(other, key)
            raise CodebookError(
                f"{out} holds an unfinished build with another {what}: choose another --out, or delete {self.folder}"
            )

    def _failed(self, error: Exception) -> CodebookError:
        reason = getattr(error, "strerror", None) or str(error)
        full = isinstance(error, (OSError, sqlite3.OperationalError))
        if not full:
            return CodebookError(f"the unfinished build in {self.folder} is damaged: delete it and run again")
        return CodebookError(
            f"cannot write to {self.folder}: {reason}; finished images are kept: free space there and run again"
        )


def differences(a: Any, b: Any) -> str:
    """Names of the settings in which two keys differ."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return "key"
    flat_a, flat_b = ({**k, **k.get("settings", {}), "settings": None} for k in (a, b))
    return ", ".join(k for k in flat_b if flat_a.get(k) != flat_b[k]) or "key"


def _part(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32] + ".safetensors"


def _lock(path: Path, out: Path) -> Any:
    """Hold the folder for this process; a killed process lets go by itself."""
    file = path.open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: two builds into one folder are the user's own lookout
        pass
    except BlockingIOError:
        file.close()
        raise CodebookError(f"another build is running in {out}: wait for it, or choose another --out") from None
    return file


class _Connection(SqliteMultithread):
    """sqlitedict's database thread, but an error in it reaches the caller.

    The stock thread dies of a failed COMMIT, as on a full disk, and the caller waits for its reply for ever.
    """

    def run(self) -> None:
        try:
            super().run()
        except Exception:
            self.exception = sys.exc_info()

    def select(self, req: str, arg: Any = None) -> Any:
        replies: Queue[Any] = Queue()
        self.execute(req, arg, replies)
        while True:
            alive = self.is_alive()  # asked before the queue is: what a dying thread still says is heard
            try:
                row = replies.get(timeout=WAIT)
            except Empty:
                self.check_raise_error()
                if not alive:
                    raise sqlite3.OperationalError("the journal's database is closed") from None
                continue
            self.check_raise_error()
            if row == "--no more--":
                return
            yield row


class _Records(SqliteDict):
    def _new_conn(self) -> _Connection:
        return _Connection(self.filename, self.autocommit, self.journal_mode, self._outer_stack)
