"""`codebook inspect`: what a codebook holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codebook.cli.options import JsonOption, NamedModelOption
from codebook.cli.output import write_picture
from codebook.errors import CodebookError, printable

if TYPE_CHECKING:
    from PIL import Image

    from codebook.store.codebook import Codebook


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a codebook, or a name that `codebook list` shows.")],
    sheet: Annotated[Path | None, typer.Option(help="Write a picture of the tokens behind the prototypes.")] = None,
    images: Annotated[
        list[Path] | None, typer.Option(help="Where the images are, for --sheet; repeat for several.")
    ] = None,
    model: NamedModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a codebook holds and how it was built."""
    from codebook.cli.checks import check_output_file
    from codebook.store.folder import parse_book, read_folder, whole_config
    from codebook.store.known import find_named

    if sheet is not None:
        check_output_file(sheet)
    folder = find_named(folder)
    config, files = read_folder(folder)
    prototypes, provenance = parse_book(folder, config, files)
    if sheet is not None:
        from codebook.store.codebook import Codebook  # torch is imported for a sheet only

        write_picture(draw_sheet(Codebook.of_files(folder, config, files), folder, images or [], model), sheet)
    clusters = Counter(record["cluster"] for record in provenance)
    report = {k: v for k, v in whole_config(prototypes, config).items() if k != "fingerprint"} | {
        "folder": str(folder),
        "clusters": [
            {
                "cluster": cluster,
                "prototypes": size,
                "images": len({r["image"] for r in provenance if r["cluster"] == cluster and "image" in r}),
            }
            for cluster, size in clusters.most_common()
        ],
    }
    if sheet is not None:
        report["sheet"] = str(sheet)
    if as_json:
        print(json.dumps(report))
        return
    for key, value in report.items():
        if key != "clusters":
            print(printable(f"{key}: {json.dumps(value) if isinstance(value, dict) else value}", 2000))
    for row in report["clusters"]:
        print(f"cluster {row['cluster']}: {row['prototypes']} prototypes from {row['images']} images")


def draw_sheet(book: Codebook, folder: Path, images: list[Path], named: str | None) -> Image.Image:
    """A picture of the tokens behind the prototypes."""
    from codebook import building, models
    from codebook.building.sheet import sheet

    if not images:
        raise CodebookError("--sheet needs --images: the images that the codebook came from")
    grid = book.config.get("grid")
    if grid is None:  # imported, or built by an early version
        from codebook.cli.probing import model_of

        model, _ = models.load(model_of(book, folder, named), "cpu")
        book.check(model)
        grid = models.family(model).grid(model)
    title = f"{len(book)} prototypes for {book.config['model']}: tokens that change no answer, and recur"
    return sheet(book.provenance, tuple(grid), [building.open_images(path) for path in images], title)
