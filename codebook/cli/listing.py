"""`codebook list`: the codebooks on this machine and those of the registry, the methods and the presets."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from codebook.cli.options import JsonOption
from codebook.errors import CodebookError, printable


def list_command(as_json: JsonOption = False) -> None:
    """List the codebooks that ship, were fetched, or can be fetched by name; the methods; and the presets."""
    books, fetchable = _books(), _fetchable()
    methods, named = written_names()
    if as_json:
        lists = {"codebooks": books, "registry": fetchable, "methods": methods, "presets": named}
        print(json.dumps(lists, indent=1))
        return
    print("codebooks on this machine:")
    for book in books:
        print(printable(f"  {book['name']}: {_book_words(book)}, in {book['folder']}", 2000))
    if fetchable:
        print("codebooks of the registry, fetched by `codebook pull NAME` or --pull:")
    for entry in fetchable:
        print(f"  {entry['name']}: {_book_words(entry)}, {entry['bytes'] / 2**20:.1f} MiB")
    print(f"methods, each also a preset, alone or as method+random, method+drop:\n  {', '.join(methods)}")
    print("presets, for 32 layers:")
    for name, text in named.items():
        print(f"  {name}: {text}")


def written_names() -> tuple[list[str], dict[str, str]]:
    """The names of all methods, and the presets with their texts.

    They are read from the code and not imported from it: the methods are made with torch, which takes seconds to load.
    """
    methods = _written("methods/__init__.py", "METHODS")
    with_mass, presets = _written("text.py", "WITH_MASS"), _written("presets.py", "SCHEDULE_PRESETS")
    named = {name: f"{ast.literal_eval(method)}+mass" for name, method in with_mass.items()}
    return sorted(methods), named | {name: ast.literal_eval(text) for name, text in presets.items()}


def _written(file: str, name: str) -> dict[str, ast.expr]:
    """The entries of a dict that a file of `codebook/pruning` defines, by their keys, as they are written."""
    tree = ast.parse((Path(__file__).parents[1] / "pruning" / file).read_text(encoding="utf-8"))
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {ast.literal_eval(key): value for key, value in pairs if key is not None}
    raise AssertionError(f"no {name} in {file}")  # a test looks for all of them


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
    return f"{row['prototypes']} prototypes of dimension {row['dimension']} for {row['model']}{revision}"
