"""`codebook list`: the shipped codebooks, the methods and the presets."""

from __future__ import annotations

import json

from codebook.cli.options import JsonOption


def list_command(as_json: JsonOption = False) -> None:
    """List the codebooks that ship with the package, the methods, and the presets."""
    from codebook.pruning import METHODS
    from codebook.pruning.presets import SCHEDULE_PRESETS
    from codebook.pruning.text import WITH_MASS
    from codebook.store.folder import read_config
    from codebook.store.shipped import folders

    books = []
    for folder in folders():
        config = read_config(folder)
        books.append({"name": folder.name, "model": config["model"], "prototypes": config["prototypes"],
                      "dimension": config["dimension"], "folder": str(folder)})  # fmt: skip
    methods = sorted(METHODS)
    named = {name: f"{method}+mass" for name, method in WITH_MASS.items()} | SCHEDULE_PRESETS
    if as_json:
        print(json.dumps({"codebooks": books, "methods": methods, "presets": named}, indent=1))
        return
    print("codebooks:")
    for book in books:
        print(
            f"  {book['name']}: {book['prototypes']} prototypes of dimension {book['dimension']}, in {book['folder']}"
        )
    print(f"methods, each also a preset, alone or as method+random, method+drop:\n  {', '.join(methods)}")
    print("presets, for 32 layers:")
    for name, text in named.items():
        print(f"  {name}: {text}")
