"""`codebook push`: a codebook to a repository of the Hugging Face Hub, with its card."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Annotated

import typer

from codebook.cli.options import JsonOption
from codebook.cli.output import note
from codebook.errors import CodebookError, printable


def push_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a codebook, or a name that `codebook list` shows.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it is not there.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who can see a new repository; default: as its owner has it."),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the codebook, as in apache-2.0.")] = None,
    images: Annotated[
        list[Path] | None, typer.Option(help="Where its images are, for a picture in the card; repeat for several.")
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(help="A results.json of `codebook bench`, for a table in the card.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Push a codebook to the Hugging Face Hub.

    Its README.md is its card, written anew if an option here adds to it.
    """
    from codebook.store.card import NO_LICENCE, SHEET, make_card
    from codebook.store.folder import CARD, HORIZON_FILE, OPTIONAL, parse_book, read_folder, sealed
    from codebook.store.horizons import carried_horizon
    from codebook.store.hub import LARGEST_SHEET, check_hub_name, push_files
    from codebook.store.known import find_named
    from codebook.store.reading import is_file, is_folder, read_whole

    check_hub_name(repository)
    path, remedy = find_named(folder), "restore it, or remove it"
    config, found = read_folder(path, OPTIONAL)
    files = {name: found[name] for name in config["sha256"] if name in found}  # in their order, for the same bytes
    parse_book(path, config, files)  # what cannot be read is not pushed
    horizon = carried_horizon(path, config["fingerprint"])
    if horizon is None and is_file(path / HORIZON_FILE):
        note(f"{HORIZON_FILE} stays here: it is of another model, or does not say of which")
    picture = read_whole(path / SHEET, remedy, LARGEST_SHEET) if is_file(path / SHEET) else None
    if images:
        from codebook.cli.inspect import draw_sheet
        from codebook.store.codebook import Codebook

        if "grid" not in config:
            raise CodebookError("the codebook does not say which patches its prototypes are: leave --images out")
        drawn = io.BytesIO()
        draw_sheet(Codebook.of_files(path, config, files), path, images, None).save(drawn, format="PNG")
        picture = drawn.getvalue()
    if licence or images or bench or not is_file(path / CARD):
        figures = ""
        if bench:
            from codebook.evaluation.figures import read_figures

            figures = read_figures(bench, config["fingerprint"])
        card = make_card(config, licence, figures, picture is not None)
    else:
        card = read_whole(path / CARD, remedy).decode(errors="replace")
    if f"license: {NO_LICENCE}\n" in card:
        note("the card names no licence: say it with --licence, as in --licence apache-2.0")
    if is_folder(Path(config["model"])):
        note(f"the codebook names its model as the folder {printable(config['model'])}: all who pull it will read that")
    beside = {SHEET: picture, HORIZON_FILE: horizon}
    contents = sealed(config, files, card) | {name: data for name, data in beside.items() if data is not None}
    address = push_files(contents, repository, private=private, commit_message=message)
    if as_json:
        print(json.dumps({"repository": repository, "commit": address, "files": sorted(contents)}))
        return
    print(address)
    note(f"pull it with `codebook pull {repository}`, or Codebook.from_pretrained({repository!r})")
