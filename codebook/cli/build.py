"""`codebook build`: a codebook from training images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from codebook.cli.options import (
    ImagesOption,
    JsonOption,
    Loading,
    ModelOption,
    PilotOption,
    Probing,
    PromptOption,
    SelectOption,
    with_groups,
)
from codebook.cli.output import resumable
from codebook.errors import CodebookError


@resumable()
@with_groups
def build_command(
    model: ModelOption,
    images: ImagesOption,
    out: Annotated[Path, typer.Option(help="Folder of the codebook; run again to resume.")],
    probing: Probing,
    loading: Loading,
    preset: Annotated[
        str | None,
        typer.Option(help="Settings published for a model, as in llava-1.5-7b; default: those of MODEL, if there are."),
    ] = None,
    pilot: PilotOption = None,
    select: SelectOption = None,
    tau_p: Annotated[
        float | None, typer.Option(help="Redundant tokens have P1 below this; default: published, or the pilot's.")
    ] = None,
    tau_j: Annotated[
        float | None,
        typer.Option(help="Redundant tokens have JSD_region + 16 JSD_global below this; default: as for --tau-p."),
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Tokens probed: ranks (by [CLS]), tiles, all; default: the preset's.")
    ] = None,
    pad: Annotated[
        int | None, typer.Option(help="Token id that takes a removed token's place; default: the preset's, or padding.")
    ] = None,
    prompt: PromptOption = None,
    clusters_per_image: Annotated[int | None, typer.Option(help="Clusters of each image's probed tokens.")] = None,
    max_cluster_size: Annotated[
        int | None, typer.Option(help="A token is isolated if its cluster has at most this many tokens.")
    ] = None,
    clusters: Annotated[int | None, typer.Option(help="Clusters of the surviving tokens of all images.")] = None,
    min_image_fraction: Annotated[
        float | None,
        typer.Option(help="A token is recurrent if its cluster spans more than this fraction of the images."),
    ] = None,
    until_stable: Annotated[
        bool, typer.Option("--until-stable", help="Stop once twice as many images keep the same tokens.")
    ] = False,
    agreement: Annotated[
        float | None, typer.Option(help="What counts as the same with --until-stable, at most 1; default: 0.95.")
    ] = None,
    exhaustive: Annotated[
        bool,
        typer.Option(
            "--exhaustive", help="Run every probe on every token: slow, for analysis; the prototypes are the same."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build a codebook of tokens that never change an answer.

    Training images are probed, and the tokens that pass every test become prototypes. A setting that is not given is
    that of --preset; for a model without one, a pilot on some of the images finds the thresholds.
    """
    if tau_p is not None and tau_j is not None and (pilot is not None or select is not None):
        raise CodebookError("both thresholds are given: leave one out for the pilot to find, or --pilot and --select")
    if agreement is not None and not until_stable:
        raise CodebookError("--agreement says when to stop: add --until-stable")
    changes: dict[str, Any] = {
        "tau_p": tau_p, "tau_j": tau_j, "candidates": candidates, "prompt": prompt, "pad": pad,
        "clusters_per_image": clusters_per_image, "max_cluster_size": max_cluster_size, "clusters": clusters,
        "min_image_fraction": min_image_fraction,
    }  # fmt: skip
    steady = None if not until_stable else {} if agreement is None else {"agreement": agreement}
    run = prepared_build(model, images, out, probing, loading, changes, pilot, select, preset, steady, exhaustive)
    run(as_json)


def prepared_build(
    model: str,
    images: Path,
    out: Path,
    probing: Probing,
    loading: Loading,
    changes: dict[str, Any],
    pilot: int | None,
    select: float | None,
    preset: str | None = None,
    steady: dict[str, float] | None = None,
    exhaustive: bool = False,
) -> Callable[[bool], None]:
    """The function that builds, and reports in JSON or in words; what no model is needed to refuse is refused here.

    Parameters
    ----------
    changes
        Fields of `building.Settings` by their names, None where the option is not given.
    steady
        Fields of `building.Stability` for a build that stops by itself.
    """
    from codebook import building
    from codebook.cli.checks import CODEBOOK_FILES, check_output_folder
    from codebook.cli.output import building_progress
    from codebook.cli.probing import build_options, report_codebook

    changes = {k: v for k, v in changes.items() if v is not None}
    building.Settings(**changes)  # refuses what is out of range
    base = building.preset(preset) if preset is not None else building.published(model)
    if base is not None and (pilot is not None or select is not None):
        base = replace(base, tau_p=None, tau_j=None)
    asked: dict[str, Any] = {k: v for k, v in (("images", pilot), ("select", select)) if v is not None}
    trial, stability = building.Pilot(**asked), None if steady is None else building.Stability(**steady)
    check_output_folder(out, CODEBOOK_FILES)
    building.check_folder(out)
    loading.check(model)
    source = building.open_images(images, probing.limit)
    options = build_options(probing, loading, model, images, exhaustive)

    def run(as_json: bool) -> None:
        loaded, processor = loading.load(model)
        settings = replace(base or building.settings_for(loaded), **changes)
        with building_progress() as tick:
            book = building.build(
                loaded, processor, source, out, model_id=model, settings=settings, pilot=trial, stability=stability,
                progress=tick, **options,
            )  # fmt: skip
        report_codebook(book, out, as_json, source)

    return run
