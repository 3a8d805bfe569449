"""`codebook import`: a codebook from the files of the method's authors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from codebook.cli.options import JsonOption


def import_command(
    tensor: Annotated[Path, typer.Argument(help="A .pt file with one tensor (N, d); nothing in it is executed.")],
    images: Annotated[Path, typer.Option(help="The .json file beside it: a list of N image ids.")],
    model: Annotated[str, typer.Option(help="The model that it was built for; the files do not say.")],
    out: Annotated[Path, typer.Option(help="Folder of the codebook.")],
    as_json: JsonOption = False,
) -> None:
    """Import a codebook from files as the method's authors publish."""
    from codebook.cli.checks import CODEBOOK_FILES, check_output_folder
    from codebook.store.codebook import Codebook

    check_output_folder(out, CODEBOOK_FILES)
    book = Codebook.from_released(tensor, images, model)
    book.save(out)
    found = {"folder": str(out), "model": model, "prototypes": len(book), "dimension": book.dimension}
    print(json.dumps(found) if as_json else f"{book!r}\n{out}")
