"""`codebook list`: the codebooks on this machine and those of the registry, the methods and the presets."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import Any

from codebook.cli.options import JsonOption
from codebook.errors import CodebookError, counted, printable


def list_command(as_json: JsonOption = False) -> None:
    """List the codebooks, methods and presets that have names.

    The codebooks are those that ship, were fetched, or can be fetched.
    """
    from codebook.pruning import METHODS
    from codebook.pruning.presets import DEFAULT, SCHEDULE_PRESETS
    from codebook.pruning.text import WITH_MASS, spell_mass

    books, fetchable = _books(), _fetchable()
    methods = sorted(METHODS)
    named = {name: method + spell_mass(mass) for name, (method, mass) in WITH_MASS.items()} | SCHEDULE_PRESETS
    if as_json:
        lists = {"codebooks": books, "registry": fetchable, "methods": methods, "presets": named}
        print(json.dumps(lists, indent=1))
        return
    print("codebooks on this machine:")
    for book in books:
        _print_wrapped(printable(f"{book['name']}: {_book_words(book)}, in {book['folder']}", 2000))
    if fetchable:
        print("codebooks of the registry, fetched by `codebook pull NAME` or --pull:")
    for entry in fetchable:
        _print_wrapped(f"{entry['name']}: {_book_words(entry)}, {entry['bytes'] / 2**20:.1f} MiB")
    print("methods, to use alone or as method+random, method+drop:")
    _print_wrapped(", ".join(methods), hanging="")
    print("presets, whose layers are those of a model of 32 and scale to others:")
    for name, text in named.items():
        _print_wrapped(f"{name}: {text}{' (the default)' if name == DEFAULT else ''}")


def _print_wrapped(text: str, hanging: str = "    ") -> None:
    """Print an entry in lines that fit the terminal, or 80 columns where there is none, if its words and paths do."""
    width = shutil.get_terminal_size().columns
    print(textwrap.fill(text, width, initial_indent="  ", subsequent_indent=f"  {hanging}",
                        break_long_words=False, break_on_hyphens=False))  # fmt: skip


def _books() -> list[dict[str, Any]]:
    """The codebooks on this machine: those that ship, and those in the cache."""
    from codebook.store.folder import read_config
    from codebook.store.known import known

    books: list[dict[str, Any]] = []
    for book in known():
        row = {"name": book.name, "origin": book.origin, "folder": str(book.folder)}
        if book.revision is not None:
            row["revision"] = book.revision
        try:
            config = read_config(book.folder)
            books.append(row | {key: config[key] for key in ("model", "prototypes", "dimension")})
        except CodebookError as error:
            books.append(row | {"damaged": str(error)})
    return books


def _fetchable() -> list[dict[str, Any]]:
    """The codebooks of the registry that are not on this machine."""
    from codebook.store.known import known
    from codebook.store.registry import read_registry

    here = {book.name for book in known()}
    return [
        {"name": entry.name, "model": entry.models[0], "prototypes": entry.prototypes, "dimension": entry.dimension,
         "licence": entry.licence, "source": entry.source, "revision": entry.revision,
         "bytes": sum(file.size for file in entry.files.values())}
        for entry in read_registry() if entry.name not in here
    ]  # fmt: skip


def _book_words(row: dict[str, Any]) -> str:
    if "damaged" in row:
        return f"damaged ({row['damaged']})"
    revision = f", {row['origin']} at {row['revision'][:12]}" if "origin" in row and "revision" in row else ""
    return f"{counted(row['prototypes'], 'prototype')} of dimension {row['dimension']} for {row['model']}{revision}"
