"""A journal's database read as what it is, for tests."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any


def read_journal(file: Path) -> tuple[Any, dict[str, Any]]:
    """What the records depend on, and their values by name in the order in which they were written."""
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)) as database:
        rows = database.execute("SELECT key, value FROM records ORDER BY rowid").fetchall()
    [(_, about), *records] = [(json.loads(key), json.loads(text)["value"]) for key, text in rows]
    return about, dict(records)


def count_records(file: Path) -> int:
    """How many records a journal has; 0 while it is not there yet."""
    try:
        return len(read_journal(file)[1])
    except (sqlite3.OperationalError, ValueError):
        return 0
