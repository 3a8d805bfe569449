"""`codebook explain`: why one token of a picture is dropped."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from codebook.cli.options import CodebookOption, JsonOption, Loading, ModelOption, PullOption, with_groups
from codebook.cli.output import note, write_picture
from codebook.errors import CodebookError, printable


@with_groups
def explain_command(
    model: ModelOption,
    loading: Loading,
    image: Annotated[Path, typer.Option(help="Picture that the token belongs to.")],
    patch: Annotated[str, typer.Option(help="ROW,COL of the token, counted from 0.")],
    keep: Annotated[float, typer.Option(help="Say whether the token is kept if this share of them is.")] = 0.2,
    neighbours: Annotated[int, typer.Option(min=1, help="Prototypes to name.")] = 5,
    show: Annotated[
        Path | None, typer.Option(help="Write a picture of the image's redundancy, with the patch framed.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a picture of the tokens behind those prototypes.")] = None,
    images: Annotated[
        list[Path] | None, typer.Option(help="Where the codebook's images are, for --sheet; repeat for several.")
    ] = None,
    codebook: CodebookOption = None,
    pull: PullOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say why a token of a picture is dropped.

    It names the prototypes that the token is like, where they come from, and what the probes measured.
    """
    from codebook import models
    from codebook.analysis.explain import explain, explanation_picture, explanation_text
    from codebook.building import open_images
    from codebook.building.sheet import sheet as draw_sheet
    from codebook.cli.checks import check_codebook, check_output_picture
    from codebook.inference.overlay import shown_part
    from codebook.pruning.stage import check_keep, tokens_kept
    from codebook.store.pictures import read_image
    from codebook.store.shipped import find_codebook

    try:
        row, col = (int(number) for number in patch.split(","))
    except ValueError:
        raise CodebookError(f"cannot read the patch {patch!r}: write ROW,COL, counted from 0") from None
    check_keep(keep)
    if sheet is not None and not images:
        raise CodebookError("--sheet needs --images: the images that the codebook came from")
    if sheet is not None:
        check_output_picture(sheet, [image])
    if show is not None:
        check_output_picture(show, [image])
    check_codebook(codebook, model, pull)
    loading.check(model)
    picture = read_image(image)
    loaded, processor = loading.load(model)
    book = find_codebook(loaded, codebook)
    found = explain(loaded, processor, book, picture, (row, col), neighbours)
    kept = tokens_kept(keep, found.tokens)
    written = {"picture": show, "sheet": sheet}
    if sheet is not None:
        title = f"prototypes nearest to patch {row},{col} of {image.name}"
        sources = [open_images(folder) for folder in images or ()]
        write_picture(draw_sheet(found.neighbours, found.grid, sources, title), sheet)
    if show is not None:
        family = models.family(models.unwrap(loaded))
        part = shown_part(picture, family.shown_box(processor, picture.size))
        write_picture(explanation_picture(part, found, kept), show)
    if as_json:
        about = {key: value for key, value in asdict(found).items() if key != "redundancy"}
        about |= {"tokens": found.tokens, "keep": kept, "kept": found.kept(kept)}
        print(json.dumps(about | {name: str(path) for name, path in written.items() if path is not None}))
        return
    for line in explanation_text(found, book.config, kept).splitlines():
        print(printable(line, 2000))
    for name, path in written.items():
        if path is not None:
            note(f"{name}: {path}")
