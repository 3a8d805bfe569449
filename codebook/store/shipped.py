"""The codebooks that ship with the package, and which of them belongs to a model."""

from __future__ import annotations

from pathlib import Path

from codebook.errors import CodebookError
from codebook.models import Model, fingerprint, same_fingerprint
from codebook.store.codebook import Codebook
from codebook.store.folder import read_config


def folders() -> list[Path]:
    """The shipped codebooks' folders: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    for root in (package / "indexes", package.parent / "indexes"):
        if root.is_dir():
            return sorted(path.parent for path in root.glob("*/config.json"))
    return []


def folder_of(source: Path | str) -> Path:
    """The folder of a codebook that is named by it, or by a name in `codebook list`.

    A name comes before a folder of that name: write `./name` for the folder.
    """
    return next((folder for folder in folders() if folder.name == str(source)), Path(source))


def prebuilt(model: Model) -> Codebook:
    """The shipped codebook that was built for this very model: same tower and projector.

    Raises
    ------
    CodebookError
        If none was.
    """
    own = fingerprint(model)
    for folder in folders():
        if same_fingerprint(read_config(folder)["fingerprint"] or "", own):
            return Codebook.load(folder)
    raise CodebookError(
        "no codebook ships for this model: build one with `codebook build` and name it with --codebook, or prune "
        "without one: --schedule farthest+mass"
    )


def find_codebook(model: Model, source: Codebook | Path | str | None) -> Codebook:
    """A model's codebook: the one that is given, or that lies in a folder, if it is this model's, or the shipped one.

    Raises
    ------
    CodebookError
        If there is none, or it is another model's.
    """
    if source is None:
        return prebuilt(model)
    book = source if isinstance(source, Codebook) else Codebook.load(source)
    book.check(model)
    return book
