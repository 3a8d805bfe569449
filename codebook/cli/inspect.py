"""`codebook inspect`: what a codebook holds."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codebook.cli.options import JsonOption, NamedModelOption
from codebook.cli.output import write_picture
from codebook.errors import CodebookError, counted, printable

if TYPE_CHECKING:
    from PIL import Image

    from codebook.store.codebook import Codebook


TOLD = ("candidates", "prompt", "tau_p", "tau_j", "max_cluster_size", "min_image_fraction")
"""Settings that are shown where all of them are known; an imported codebook has none."""


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
    from codebook.cli.checks import check_output_picture
    from codebook.store.folder import parse_book, read_folder, whole_config
    from codebook.store.known import find_named

    if sheet is not None:
        check_output_picture(sheet)
    folder = find_named(folder)
    config, files = read_folder(folder)
    prototypes, provenance = parse_book(folder, config, files)
    if sheet is not None:
        from codebook.store.codebook import Codebook  # torch is imported for a sheet only

        write_picture(draw_sheet(Codebook.of_files(folder, config, files), folder, images or [], model), sheet)
    clusters = Counter(record["cluster"] for record in provenance)
    images_of = defaultdict[int, set[str]](set)
    for record in provenance:
        if "image" in record:
            images_of[record["cluster"]].add(record["image"])
    report = {k: v for k, v in whole_config(prototypes, config).items() if k != "fingerprint"} | {
        "folder": str(folder),
        "clusters": [
            {"cluster": cluster, "prototypes": size, "images": len(images_of[cluster])}
            for cluster, size in clusters.most_common()
        ],
    }
    if sheet is not None:
        report["sheet"] = str(sheet)
    if as_json:
        print(json.dumps(report))
        return
    for line in _inspection(report):
        print(printable(line, 2000))


def _inspection(report: dict[str, Any]) -> Iterator[str]:
    """The report for people, in lines that fit 80 columns where names and paths let them."""
    settings, images, funnel = (report.get(key) or {} for key in ("settings", "images", "funnel"))
    grid, told = report.get("grid"), all(key in settings for key in TOLD)
    facts = {
        "model": report["model"],
        "prototypes": f"{report['prototypes']} of dimension {report['dimension']}",
        "folder": report["folder"],
        "computed in": str(report.get("dtype") or "").removeprefix("torch."),
        "grid": f"{grid[0]} x {grid[1]} tokens" if grid else "",
        "images": _images(images) if images else "",
    }
    if told:
        facts |= {
            "probed": f"tokens by {settings['candidates']!r}, asked {settings['prompt']!r}",
            "thresholds": f"P1 below {settings['tau_p']}, JSD below {settings['tau_j']}",
            "isolated": f"in clusters of at most {settings['max_cluster_size']} of the image's probed tokens",
            "recurrent": f"in clusters of more than {settings['min_image_fraction']} of the images",
        }
    facts |= {"spread": report.get("spread") or "", "sheet": report.get("sheet", "")}
    yield from (f"{name:<12}{value}" for name, value in facts.items() if value)
    if funnel:
        yield ""
        yield f"{'tokens left by each step':<26}{'number':>8}{'share':>8}"
        first = next(iter(funnel.values())) or 1
        yield from (f"  {step:<24}{count:>8}{count / first:>8.1%}" for step, count in funnel.items())
    yield ""
    yield f"{'cluster':<10}{'prototypes':>12}{'images':>9}"
    yield from (f"{row['cluster']!s:<10}{row['prototypes']:>12}{row['images']:>9}" for row in report["clusters"])


def _images(used: dict[str, Any]) -> str:
    skipped = len(used.get("skipped") or ())
    return f"{used.get('used')}" + (f", {skipped} more could not be read" if skipped else "")


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
    title = f"{counted(len(book), 'prototype')} for {book.config['model']}: tokens that change no answer, and recur"
    return sheet(book.provenance, tuple(grid), [building.open_images(path) for path in images], title)
