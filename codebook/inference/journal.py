"""A file of finished pieces of work, a JSON line each: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from codebook.errors import CodebookError


class Journal:
    """Records by name, in memory and, unless `file` is None, in a file that the next run reads.

    Parameters
    ----------
    file
        Made with its folder when the first record is added.
    about
        What the records depend on, as JSON. A file about something else is refused.
    others
        Files of other parts of the work, which may still be growing: their records are read, none is added.
    """

    def __init__(self, file: Path | None, about: dict[str, Any], others: Iterable[Path] = ()) -> None:
        self.file, self.about = file, json.loads(json.dumps(about))
        self.records: dict[str, Any] = {}
        for other in others:
            self._read(other)
        if file is not None and file.exists():
            cut = self._read(file)
            if cut:
                with file.open("r+b") as out:
                    out.truncate(file.stat().st_size - cut)

    def _read(self, file: Path) -> int:
        """Take in a file's records; how many bytes at its end are of a line that was cut."""
        try:
            lines = file.read_bytes().splitlines(keepends=True)
            whole = [json.loads(line) for line in lines if line.endswith(b"\n")]  # a kill can cut the last one
            if whole:
                other = whole[0]["about"]
                self.records |= {entry["name"]: entry["value"] for entry in whole[1:]}
        except (OSError, ValueError, KeyError, TypeError):
            raise CodebookError(f"{file} is no journal: choose another file, or delete it") from None
        if whole and other != self.about:
            what = ", ".join(k for k in self.about if other.get(k) != self.about[k]) or "settings"
            raise CodebookError(f"{file} is from a run with another {what}: choose another file, or delete it")
        return sum(len(line) for line in lines if not line.endswith(b"\n"))

    def __contains__(self, name: str) -> bool:
        return name in self.records

    def __getitem__(self, name: str) -> Any:
        return self.records[name]

    def add(self, name: str, value: Any) -> None:
        """Keep a record, a value of JSON."""
        self.records[name] = value
        if self.file is None:
            return
        fresh = not self.file.exists() or not self.file.stat().st_size
        if fresh:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write((json.dumps({"about": self.about}) + "\n") * fresh)
            out.write(json.dumps({"name": name, "value": value}) + "\n")
