"""`codebook pull`: a codebook that others share, fetched by name."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from codebook.cli.options import JsonOption
from codebook.cli.output import fetching_progress, note, resumable
from codebook.errors import counted


@resumable()
def pull_command(
    name: Annotated[str, typer.Argument(help="A name of the registry, as `codebook list` shows, or OWNER/NAME.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a repository on the hub; default: main.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a codebook of the registry or the Hugging Face Hub."""
    from codebook.store.fetching import pull
    from codebook.store.folder import parse_book, read_folder

    with fetching_progress(name) as tick:
        folder = pull(name, revision, tick=tick)
    config, files = read_folder(folder)
    parse_book(folder, config, files)
    if as_json:
        found = {key: config[key] for key in ("model", "prototypes", "dimension")}
        print(json.dumps({"name": name, "folder": str(folder)} | found))
        return
    note(f"{counted(config['prototypes'], 'prototype')} of dimension {config['dimension']} for {config['model']}")
    print(folder)
