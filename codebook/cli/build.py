"""`codebook build`: a codebook from training images."""

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
    ModelOption,
    StrictOption,
    WorkersOption,
)
from codebook.cli.output import resumable


@resumable()
def build_command(
    model: ModelOption,
    images: ImagesOption,
    out: Annotated[Path, typer.Option(help="Folder of the codebook; run again to resume.")],
    preset: Annotated[
        str | None, typer.Option(help="Thresholds of a published model; default: the model's own.")
    ] = None,
    tau_p: Annotated[float | None, typer.Option(help="Redundant tokens have P1 below this.")] = None,
    tau_j: Annotated[float | None, typer.Option(help="... and JSD_region + 16 JSD_global below this.")] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Tokens probed: ranks (by [CLS]), tiles, all; default: the preset's.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The question of every probe.")] = None,
    clusters_per_image: Annotated[int | None, typer.Option(help="Clusters of each image's probed tokens.")] = None,
    max_cluster_size: Annotated[
        int | None, typer.Option(help="A token is isolated if its cluster has at most this many tokens.")
    ] = None,
    clusters: Annotated[int | None, typer.Option(help="Clusters of the surviving tokens of all images.")] = None,
    min_image_fraction: Annotated[
        float | None,
        typer.Option(help="A token is recurrent if its cluster spans more than this fraction of the images."),
    ] = None,
    limit: LimitOption = None,
    batch: BatchOption = None,
    strict: StrictOption = False,
    exhaustive: Annotated[
        bool,
        typer.Option("--exhaustive", help="Run every probe on every token, for analysis: slow, same prototypes."),
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = "local",
    address: AddressOption = None,
    workers: WorkersOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Probe training images and store the tokens that never change the answer as prototypes."""
    from codebook import building
    from codebook.cli.checks import CODEBOOK_FILES, check_output_folder
    from codebook.cli.output import building_progress
    from codebook.cli.probing import Probing, report_codebook
    from codebook.models.loading import check_device

    probing = Probing(limit, strict, batch, device, dtype, exhaustive, engine, address, workers)
    changes = {
        "tau_p": tau_p, "tau_j": tau_j, "candidates": candidates, "prompt": prompt,
        "clusters_per_image": clusters_per_image, "max_cluster_size": max_cluster_size, "clusters": clusters,
        "min_image_fraction": min_image_fraction,
    }  # fmt: skip
    settings = building.preset(preset or model, **{k: v for k, v in changes.items() if v is not None})
    check_output_folder(out, CODEBOOK_FILES)
    check_device(device)
    source = building.open_images(images, limit)  # before a model is loaded for nothing
    loaded, processor = probing.load(model)
    with building_progress(len(source.names)) as tick:
        options = probing.options(model, images, settings)
        book = building.build(
            loaded, processor, source, out, model_id=model, settings=settings, progress=tick, **options
        )  # fmt: skip
    report_codebook(book, out, as_json, source)
