"""`codebook show`: what several methods keep of one picture, side by side."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codebook.cli.options import (
    CodebookOption,
    JsonOption,
    KeepOption,
    Loading,
    MethodsOption,
    ModelOption,
    PullOption,
    QuestionOption,
    SeedOption,
    with_groups,
)
from codebook.cli.output import note, write_picture
from codebook.errors import CodebookError, unknown

if TYPE_CHECKING:
    from codebook.pruning import Schedule

DRAWN = {
    "kept": "framed: kept; dark: dropped",
    "mass": "framed: kept; a line goes from each dropped token to the kept one that stands for it",
    "scores": "framed: kept; dark blue to yellow: the lowest score to the highest",
}
"""What can be drawn, and the note below it."""
LATER_STAGES = " by the first stage; red, blue, green: by the second, third, fourth"
"""What the note on what is kept adds where a method has more than one stage."""


@with_groups
def show_command(
    model: ModelOption,
    loading: Loading,
    image: Annotated[Path, typer.Option(help="Picture to ask about.")],
    question: QuestionOption,
    methods: MethodsOption,
    keep: KeepOption = 0.2,
    draw: Annotated[
        str,
        typer.Option(
            help="kept: what stays, and which stage dropped the rest; mass: who stands for whom; scores: the method's."
        ),
    ] = "kept",
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("show.png"),
    codebook: CodebookOption = None,
    pull: PullOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw what methods keep of a picture, and what is then answered."""
    from codebook.cli.checks import check_codebook, check_output_picture
    from codebook.cli.methods import codebook_for, parse_methods
    from codebook.evaluation.rows import Row, distinct, row_of
    from codebook.inference.looking import look_closely
    from codebook.inference.overlay import comparison, maps, mass_picture, score_picture, stages_picture
    from codebook.inference.samples import check_asked
    from codebook.pruning import Schedule
    from codebook.pruning.stage import check_keep
    from codebook.pruning.text import UNPRUNED
    from codebook.store.pictures import read_image

    if draw not in DRAWN:
        raise unknown("no picture", draw, DRAWN)
    check_asked(question)
    chosen = parse_methods(methods)
    check_keep(keep)
    check_output_picture(out, [image])
    check_codebook(codebook, model, pull)
    loading.check(model)
    picture = read_image(image)
    loaded, processor = loading.load(model)
    book, rows = codebook_for(loaded, chosen, codebook), [Row(UNPRUNED, 1.0, (None,))]
    different, skipped = distinct([row_of(loaded, method, keep, book, [seed]) for method in chosen])
    rows += different
    schedules = [row.schedules[0] or Schedule([]) for row in rows]
    for row, schedule in zip(rows, schedules, strict=True):
        _check_drawn(draw, row.method, schedule)
    looks = [look_closely(loaded, processor, picture, question, schedule) for schedule in schedules]
    ways, drawn = [], []
    for row, found in zip(rows, looks, strict=True):
        [part], grid = found.answer.pictures, found.grid
        stages = found.stages or [list(range(grid[0] * grid[1]))]
        counts = " -> ".join(str(len(left)) for left in stages)
        heading, words = f"{row.method}: {counts} of {grid[0] * grid[1]}", found.answer.text or "(nothing)"
        ways.append((heading, words, stages[-1]))
        if draw == "mass" and found.stands:
            shown = mass_picture(part, found.stands, stages[-1], grid)
        elif draw == "scores" and found.scores:
            shown = score_picture(part, found.scores, stages[-1], grid)
        else:
            shown = stages_picture(part, stages, grid)
        drawn.append((heading, words, shown))
    staged = draw == "kept" and any(len(found.stages) > 1 for found in looks)
    write_picture(comparison(drawn, DRAWN[draw] + LATER_STAGES * staged), out)
    if as_json:
        report = [
            {"method": row.method, "keep": row.keep, "text": found.answer.text, "score": None, "kept": [way[2]],
             "stages": found.stages, "stands": found.stands, "scores": found.scores}
            for row, found, way in zip(rows, looks, ways, strict=True)
        ]  # fmt: skip
        print(
            json.dumps(
                {
                    "question": question,
                    "grid": grid,
                    "keep": keep,
                    "rows": report,
                    "skipped": skipped,
                    "picture": str(out),
                }
            )
        )
        return
    marks = "■·" if "utf" in (sys.stdout.encoding or "").lower() else "#."
    print(maps(ways, grid, shutil.get_terminal_size((120, 24)).columns, marks))
    note(f"picture: {out}")


def _check_drawn(draw: str, method: str, schedule: Schedule) -> None:
    """Refuse to draw what a method has not: a picture without it would look as if nothing was scored, or stood for."""
    from codebook.pruning.methods.base import ScoringPruner

    if not schedule.stages:
        return
    if draw == "mass" and not any(stage.mass for stage in schedule.stages):
        raise CodebookError(f"no token of {method} stands for others: write {method}+mass, or leave --draw out")
    if draw == "scores" and not any(isinstance(stage.pruner, ScoringPruner) for stage in schedule.stages):
        raise CodebookError(f"{method} ranks no tokens, so there are no scores to draw: leave it, or --draw, out")
