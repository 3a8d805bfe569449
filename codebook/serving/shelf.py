"""The codebooks of a service by their names, all read before any is served."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from codebook.errors import CodebookError, quoted
from codebook.serving.wire import ServedCodebook
from codebook.store.codebook import Codebook
from codebook.store.folder import PROTOTYPES
from codebook.store.shipped import folders

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
"""What a name may look like: it stands in addresses and in metrics."""
MOST_NAMES = 10
"""Names that an error lists."""


class Shelf:
    """Codebooks by name, and the folders that they were read from.

    Parameters
    ----------
    given
        The folder of each name.

    Raises
    ------
    CodebookError
        If a folder holds no whole codebook.
    """

    def __init__(self, given: Mapping[str, Path]) -> None:
        self._folders = dict(given)
        self._books = self._read()

    def reload(self) -> None:
        """Read all folders again; the new codebooks take the old ones' place when all are there and none before."""
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
        books = {name: Codebook.load(folder) for name, folder in self._folders.items()}
        for book in books.values():
            book.redundancy(book.prototypes[:1])  # what a search prepares is ready before the first request
        return books


def named_folders(given: Iterable[str]) -> dict[str, Path]:
    """The folder of each name, of texts as in `--codebook`: NAME=DIR, or the name of a shipped codebook.

    Raises
    ------
    CodebookError
        If a name is no name, or stands for two folders.
    """
    shipped = {folder.name: folder for folder in folders()}
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not NAME.fullmatch(name):
            raise CodebookError(f"{quoted(name)} names no codebook: use letters, digits, '.', '_' and '-', at most 64")
        if name in found:
            raise CodebookError(f"two codebooks are named {name}: give each a name of its own")
        if not equals and name not in shipped:
            raise CodebookError(f"no codebook {name} ships: name a folder, {name}=DIR, or one of {', '.join(shipped)}")
        found[name] = Path(folder) if equals else shipped[name]
    return found
