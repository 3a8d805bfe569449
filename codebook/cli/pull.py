"""`codebook pull`: a codebook that others share, fetched by name."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from codebook.cli.options import JsonOption
from codebook.cli.output import fetching_progress, resumable


@resumable()
def pull_command(
    name: Annotated[str, typer.Argument(help="A name of the registry, as `codebook list` shows, or OWNER/NAME.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a repository on the hub; default: main.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a codebook of the registry or of the Hugging Face Hub into the cache."""
    from codebook.store.codebook import Codebook
    from codebook.store.fetching import pull

    with fetching_progress(name) as tick:
        folder = pull(name, revision, tick=tick)
    book = Codebook.load(folder)
    if as_json:
        found = {"name": name, "folder": str(folder), "model": book.config["model"]}
        print(json.dumps(found | {"prototypes": len(book), "dimension": book.dimension}))
    else:
        print(f"{book!r}\n{folder}")
