"""`codebook extend`: more images for a codebook."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from codebook.cli.options import (
    AddressOption,
    BatchOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    ImagesOption,
    JsonOption,
    LimitOption,
    NamedModelOption,
    StrictOption,
    WorkersOption,
)
from codebook.cli.output import resumable


@resumable()
def extend_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a codebook, or a name; it stays as it is.")],
    images: ImagesOption,
    out: Annotated[Path, typer.Option(help="Folder of the larger codebook; run again to resume.")],
    model: NamedModelOption = None,
    limit: LimitOption = None,
    batch: BatchOption = None,
    strict: StrictOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = "local",
    address: AddressOption = None,
    workers: WorkersOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Add images to a codebook: the same result as building it from all of them."""
    from codebook import building
    from codebook.cli.checks import CODEBOOK_FILES, check_output_folder
    from codebook.cli.output import building_progress
    from codebook.cli.probing import Probing, model_of, report_codebook
    from codebook.models.loading import check_device
    from codebook.store.known import find_named

    probing = Probing(limit, strict, batch, device, dtype, False, engine, address, workers)
    check_output_folder(out, CODEBOOK_FILES)
    check_device(device)
    folder = find_named(folder)
    book, _ = building.SurvivorPool.load(folder)
    name = model_of(book, folder, model)
    source = building.open_images(images, limit)  # before a model is loaded for nothing
    loaded, processor = probing.load(name)
    with building_progress(len(source.names)) as tick:
        options = probing.options(name, images, building.read_settings(book.config["settings"], folder))
        book = building.extend(loaded, processor, folder, source, out, progress=tick, **options)
    report_codebook(book, out, as_json, source)
