"""`codebook merge`: one codebook from two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from codebook.cli.options import JsonOption
from codebook.cli.output import resumable


@resumable()
def merge_command(
    first: Annotated[Path, typer.Argument(help="Folder of a codebook, or a name that `codebook list` shows.")],
    second: Annotated[Path, typer.Argument(help="Another one, of the same model and settings.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged codebook.")],
    as_json: JsonOption = False,
) -> None:
    """Merge two codebooks.

    The result is the same as that of a build from the images of both.
    """
    from codebook import building
    from codebook.cli.checks import CODEBOOK_FILES, check_output_folder
    from codebook.cli.probing import report_codebook
    from codebook.store.known import find_named

    check_output_folder(out, CODEBOOK_FILES)
    report_codebook(building.merge(find_named(first), find_named(second), out), out, as_json)
