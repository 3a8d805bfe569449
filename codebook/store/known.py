"""The codebooks that can be named: those that ship, those in the cache, and those that the registry can fetch.

Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from codebook.errors import CodebookError, did_you_mean, quoted
from codebook.store.card import HUB_NAME
from codebook.store.folder import CONFIG, PROTOTYPES, PROVENANCE
from codebook.store.reading import is_file, is_folder
from codebook.store.registry import RegistryEntry, entry_named, index_folder, read_registry

SHIPPED, FETCHED, PULLED = "shipped", "registry", "hub"
"""Where a codebook comes from."""


@dataclass(frozen=True)
class Known:
    """A codebook whose folder is on this machine.

    Attributes
    ----------
    name
        What users call it: the folder's name, the registry's, or the repository's on the hub.
    origin
        `shipped`, `registry` or `hub`.
    folder
        Where it lies.
    revision
        Commit of the repository that it comes from; None if it ships.
    current
        Whether its revision is the one that the name alone means.
    """

    name: str
    origin: str
    folder: Path
    revision: str | None = None
    current: bool = True


def folders() -> list[Path]:
    """The shipped codebooks' folders."""
    return sorted(path.parent for path in index_folder().glob(f"*/{CONFIG}"))


def known() -> list[Known]:
    """The codebooks on this machine, those that ship first, then those of the registry, then those of the hub."""
    found = [Known(folder.name, SHIPPED, folder) for folder in folders()]
    for entry in read_registry():
        folder = entry_folder(entry)
        if is_file(folder / CONFIG):
            found.append(Known(entry.name, FETCHED, folder, entry.revision))
    return found + sorted(_pulled(), key=lambda book: (book.name, not book.current, book.revision))


def entry_folder(entry: RegistryEntry) -> Path:
    """The folder in the cache for a codebook of the registry, whether it is there or not."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "codebook" / entry.name / entry.revision


def find_named(name: Path | str) -> Path:
    """The folder of a codebook that a user names: a path, or a name of those that `codebook list` shows.

    A path with a codebook goes before a name. Nothing is fetched.

    Raises
    ------
    CodebookError
        If there is none of that name here; the message says how to get it, if the name says where it is.
    """
    path, text = Path(name), Path(name).as_posix()
    if is_file(path / CONFIG):
        return path
    found = [book for book in known() if book.name == text]
    if current := [book for book in found if book.current] or found[:1] * (len(found) == 1):
        return current[0].folder
    if found:
        raise CodebookError(f"{len(found)} revisions of {text} are in the cache: name the folder of one, as "
                            "`codebook list` shows them")  # fmt: skip
    if entry_named(text):
        raise CodebookError(f"the codebook {text} is not on this machine: `codebook pull {text}` fetches it, or --pull")
    folder, file = is_folder(path), is_file(path)
    names = [*(book.name for book in known()), *(entry.name for entry in read_registry())]
    near = "" if folder or file else did_you_mean(text, names)  # what is there was meant, whatever is called like it
    if not (folder or file) and HUB_NAME.fullmatch(text):
        raise CodebookError(
            f"no codebook in {text}, and none pulled from a repository of that name: {near}name another folder, make "
            f"one with `codebook build`, or fetch it with `codebook pull {text}`"
        )
    raise CodebookError(
        f"no codebook in {quoted(str(name))[1:-1]}{', a file' * file}: {near}name another folder, or one that "
        "`codebook list` shows, or make one with `codebook build`"
    )


def _pulled() -> Iterator[Known]:
    """The codebooks in the cache of the Hugging Face Hub; of those that were not pulled whole, none."""
    from huggingface_hub import constants

    for file in Path(constants.HF_HUB_CACHE).glob(f"models--*--*/snapshots/*/{PROTOTYPES}"):
        folder, repository = file.parent, file.parents[2]
        if all(is_file(folder / name) for name in (CONFIG, PROTOTYPES, PROVENANCE)):
            main = ""
            with contextlib.suppress(OSError, UnicodeDecodeError):
                main = (repository / "refs" / "main").read_text().strip()
            name = "/".join(repository.name.split("--")[1:])
            yield Known(name, PULLED, folder, folder.name, folder.name == main)
