"""The codebooks of a service by their names, all read before any is served."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from codebook.errors import CodebookError, quoted
from codebook.serving.wire import ServedCodebook
from codebook.store.codebook import Codebook
from codebook.store.folder import PROTOTYPES
from codebook.store.known import find_named

LONGEST_NAME = 64
NAME, NOT_IN_NAMES = re.compile(rf"(?=\w)[\w.-]{{1,{LONGEST_NAME}}}", re.ASCII), re.compile(r"[^\w.-]", re.ASCII)
"""What a name may look like, which stands in addresses and in metrics; and characters that none has."""
MOST_NAMES = 10
"""Names that an error lists."""


class Shelf:
    """Codebooks by name, and the folders that they were read from.

    Parameters
    ----------
    given
        The folder of each name, or what `codebook list` calls it.

    Raises
    ------
    CodebookError
        If a folder holds no whole codebook.
    """

    def __init__(self, given: Mapping[str, Path] | None = None) -> None:
        self._folders = dict(given or {})
        self._reading = threading.Lock()
        self.reload()

    def reload(self) -> None:
        """Read all folders again; the new codebooks take the old ones' place when all are there, and none before."""
        with self._reading:  # what was read first must not take the place of what was read later
            self._books = self._read()

    def find(self, name: str) -> Codebook | None:
        """The codebook of a name, as it is now: whoever has it goes on with it through a `reload`."""
        return self._books.get(name)

    def listing(self) -> list[ServedCodebook]:
        """What each codebook is, in the order of the names."""
        return [
            {
                "name": name,
                "model": book.config["model"],
                "dimension": book.dimension,
                "prototypes": len(book),
                "fingerprint": book.config["fingerprint"],
                "sha256": book.config["sha256"][PROTOTYPES],
            }
            for name, book in sorted(self._books.items())
        ]

    def names(self) -> str:
        """The names in words, for an error."""
        found = sorted(self._books)
        more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
        return ", ".join(found[:MOST_NAMES]) + more or "none"

    def _read(self) -> dict[str, Codebook]:
        books = {name: Codebook.load(find_named(folder)) for name, folder in self._folders.items()}
        for book in books.values():
            book.redundancy(book.prototypes[:1])  # what a search prepares is ready before the first request
        return books


def named_folders(given: Iterable[str]) -> tuple[dict[str, Path], list[Path]]:
    """The folders that texts as in `--codebook` say: NAME=DIR, or DIR alone, whose name is then the folder's own.

    In the place of a folder may stand a name that `codebook list` shows; `codebook.store.known.find_named` finds it.

    Returns
    -------
    the folder of each name
    those of the folders that came without a name

    Raises
    ------
    CodebookError
        If a name is no name, or stands for two folders.
    """
    found: dict[str, Path] = {}
    unnamed: list[Path] = []
    for text in given:
        name, equals, folder = text.partition("=")
        if not text or (equals and not folder):  # the folder that we are in is not meant
            raise CodebookError(f"{quoted(text)} names no folder: write NAME=DIR, or DIR")
        if not equals or "/" in name:  # the sign is part of a path
            unnamed.append(Path(text))
            own = NOT_IN_NAMES.sub("-", unnamed[-1].resolve().name).strip("-.")
            found |= _new(found, own[:LONGEST_NAME] or "codebook", unnamed[-1])
        else:
            found |= _new(found, name, Path(folder))
    return found, unnamed


def _new(found: Mapping[str, Path], name: str, folder: Path) -> dict[str, Path]:
    if not NAME.fullmatch(name):
        raise CodebookError(f"{quoted(name)} can name no codebook: use letters, digits, '.', '_' and '-', at most 64")
    if name in found:
        raise CodebookError(f"two codebooks are named {name}: give one another name, as in NAME={quoted(str(folder))}")
    return {name: folder}
