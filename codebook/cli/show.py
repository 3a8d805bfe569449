"""`codebook show`: what several methods keep of one picture, side by side."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from codebook.cli.options import (
    CodebookOption,
    DeviceOption,
    JsonOption,
    MethodsOption,
    ModelOption,
    PullOption,
    QuestionOption,
    SeedOption,
)
from codebook.cli.output import note, write_picture


def show_command(
    model: ModelOption,
    image: Annotated[Path, typer.Option(help="Picture to ask about.")],
    question: QuestionOption,
    methods: MethodsOption,
    keep: Annotated[float, typer.Option(help="Visual tokens kept, averaged over the layers, in (0, 1].")] = 0.25,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("show.png"),
    codebook: CodebookOption = None,
    pull: PullOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw what each of several methods keeps of a picture, and what the model then answers."""
    from codebook import models
    from codebook.cli.checks import check_codebook, check_output_file
    from codebook.cli.methods import codebook_for, parse_methods
    from codebook.evaluation import bench
    from codebook.inference.overlay import comparison, maps, shown_part
    from codebook.inference.samples import Sample
    from codebook.models.loading import check_device
    from codebook.pruning.stage import check_keep
    from codebook.store.pictures import read_image

    chosen = parse_methods(methods)
    check_keep(keep)
    check_output_file(out, [image])
    check_codebook(codebook, model, pull)
    check_device(device)
    picture = read_image(image)
    loaded, processor = models.load(model, device)
    book, rows = codebook_for(loaded, chosen, codebook), [bench.Row(bench.UNPRUNED, 1.0, (None,))]
    for method in chosen:
        rows.append(bench.row(loaded, method, keep, book, [seed]))
    [found] = bench.show_rows(loaded, processor, [Sample((picture,), question)], rows)
    grid = tuple(found["grids"][0])
    ways = [
        (f"{one['method']}: {len(one['kept'][0])} of {grid[0] * grid[1]}", one["text"] or "(nothing)", one["kept"][0])
        for one in found["rows"]
    ]
    part = shown_part(picture, models.family(models.unwrap(loaded)).shown_box(processor, picture.size))
    write_picture(comparison(part, ways, grid), out)
    if as_json:
        print(
            json.dumps({"question": question, "grid": grid, "keep": keep, "rows": found["rows"], "picture": str(out)})
        )
        return
    marks = "■·" if "utf" in (sys.stdout.encoding or "").lower() else "#."
    print(maps(ways, grid, shutil.get_terminal_size((120, 24)).columns, marks))
    note(f"picture: {out}")
