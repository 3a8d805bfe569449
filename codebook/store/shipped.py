"""Which codebook belongs to a model: one that ships, or one that was fetched before."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from codebook.errors import CodebookError, quoted
from codebook.models import Model, adapter_words, fingerprint, same_fingerprint, shape
from codebook.models.wrappers import stock
from codebook.store.codebook import Codebook
from codebook.store.folder import read_config
from codebook.store.known import FETCHED, PULLED, Known, find_named, known
from codebook.store.registry import entry_for, entry_named, read_registry

LONGEST_MODEL = 80
"""Most characters of a model's name in a command to copy."""


def prebuilt(model: Model) -> Codebook:
    """The codebook that was built for this very model, if it is on this machine. Nothing is fetched.

    Looked at are those that ship and those in the cache: first those that this package or its registry name for the
    model, then those of the same tower and projector, by their fingerprint. What a codebook from the hub says of itself
    does not choose it: only its fingerprint does.

    Raises
    ------
    CodebookError
        If there is none, or several from the hub. The message says what to do, with the commands.
    """
    name = str(stock(model).config.name_or_path or "")
    own = cache(lambda: fingerprint(model))
    here = [(book, config) for book, config in _readable() if config["dimension"] == shape(model).hidden]
    for book, config in here:
        if book.origin != PULLED and name.lower() in _models(book, config):
            said = config["fingerprint"]
            if said is None or same_fingerprint(said, own()):
                return Codebook.load(book.folder)
    same = [book for book, config in here if config["fingerprint"] and same_fingerprint(config["fingerprint"], own())]
    if same and same[0].origin == PULLED and len(same) > 1:
        choices = " or ".join(_choice(book) for book in same[:2])
        raise CodebookError(f"there are {len(same)} codebooks from the hub for this model: choose one, {choices}")
    if same:
        return Codebook.load(same[0].folder)
    raise CodebookError(_ways_on(name, own, adapter_words(model)))


def named_for(model: str) -> Path:
    """The folder of the codebook that this package or its registry names for a model of this name.

    For where the model is not loaded, and whether the codebook is its own shows later. Nothing is fetched.

    Raises
    ------
    CodebookError
        If there is none on this machine.
    """
    for book, config in _readable():
        if book.origin != PULLED and model.lower() in _models(book, config):
            return book.folder
    entry = entry_for(model)
    fetch = f": `codebook pull {entry.name}` fetches it" if entry else ""
    raise CodebookError(
        f"no codebook is named for {quoted(model)[1:-1]} on this machine{fetch}; name one, `--codebook FOLDER`, or "
        "take a method without, such as farthest"
    )


def find_codebook(model: Model, source: Codebook | Path | str | None) -> Codebook:
    """A model's codebook: the one that is given or named, if it is this model's, or the one that `prebuilt` finds.

    Parameters
    ----------
    source
        A codebook, its folder, or a name that `codebook list` shows.

    Raises
    ------
    CodebookError
        If there is none, or it is another model's.
    """
    if source is None:
        return prebuilt(model)
    if not isinstance(source, Codebook | Path | str):
        raise CodebookError(f"a codebook is a Codebook, its folder or its name, not {quoted(source)}: `codebook list` "
                            "names those that are here")  # fmt: skip
    book = source if isinstance(source, Codebook) else Codebook.load(find_named(source))
    book.check(model)
    return book


def _readable() -> Iterator[tuple[Known, dict[str, Any]]]:
    """The codebooks on this machine with their configs; what is damaged, or an old revision, belongs to no model."""
    books = known()
    current = {book.name for book in books if book.current}
    for book in books:
        if book.current or book.name not in current:
            with contextlib.suppress(CodebookError):
                yield book, read_config(book.folder)


def _models(book: Known, config: dict[str, Any]) -> list[str]:
    """The models that this package or its registry names for a codebook, in small letters."""
    entry = entry_named(book.name) if book.origin == FETCHED else None
    return [model.lower() for model in (entry.models if entry else [config["model"]])]


def _choice(book: Known) -> str:
    """A codebook as an option of the command line."""
    return f"--codebook {shlex.quote(book.name if book.current else str(book.folder))}"


def _ways_on(name: str, own: Callable[[], str], adapter: str) -> str:
    """What is wrong where a model has no codebook, and the ways on, each with its command."""
    entry = entry_for(name)
    for other in read_registry():
        if entry is None and other.fingerprint and same_fingerprint(other.fingerprint, own()):
            entry = other
    fits = 0 < len(name) <= LONGEST_MODEL
    fetch = (
        f"`codebook pull {entry.name}` (or --pull)" if entry else "`codebook pull OWNER/NAME`, if somebody shares one"
    )
    return (
        f"no codebook for {name if fits else 'this model'} is on this machine{adapter}; fetch one, {fetch}; build one, "
        f"`codebook build {shlex.quote(name) if fits else 'MODEL'} --images IMAGES --out FOLDER`, and name it with "
        "`--codebook FOLDER`; or prune without one, `--method 'divprune(middle=True)+mass'`"
    )
