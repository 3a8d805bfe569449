"""`codebook extend`: more images for a codebook."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from codebook.cli.options import ImagesOption, JsonOption, Loading, NamedModelOption, Probing, with_groups
from codebook.cli.output import resumable


@resumable()
@with_groups
def extend_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a codebook, or a name; it stays as it is.")],
    images: ImagesOption,
    out: Annotated[Path, typer.Option(help="Folder of the larger codebook; run again to resume.")],
    probing: Probing,
    loading: Loading,
    model: NamedModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add images to a codebook.

    The result is the same as that of a build from all of them.
    """
    from codebook import building
    from codebook.cli.checks import CODEBOOK_FILES, check_output_folder
    from codebook.cli.output import building_progress
    from codebook.cli.probing import build_options, model_of, report_codebook
    from codebook.store.known import find_named

    check_output_folder(out, CODEBOOK_FILES)
    building.check_folder(out)
    folder = find_named(folder)
    book, _ = building.SurvivorPool.load(folder)
    name = model_of(book, folder, model)
    loading.check(name)
    source = building.open_images(images, probing.limit)  # before a model is loaded for nothing
    options = build_options(probing, loading, name, images)
    loaded, processor = loading.load(name)
    with building_progress() as tick:
        book = building.extend(loaded, processor, folder, source, out, progress=tick, **options)
    report_codebook(book, out, as_json, source)
