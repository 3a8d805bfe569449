"""`codebook prune`: questions answered with few visual tokens, or token embeddings pruned without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from codebook.cli.options import (
    MODEL,
    CodebookOption,
    JsonOption,
    Loading,
    NewTokensOption,
    PullOption,
    RecipeOption,
    ScheduleKeepOption,
    SeedOption,
    with_groups,
)
from codebook.cli.output import resumable
from codebook.errors import CodebookError


@resumable("source")
@with_groups
def prune_command(
    loading: Loading,
    model: Annotated[str | None, typer.Argument(help=f"{MODEL}; none with --tokens.")] = None,
    keep: ScheduleKeepOption = None,
    image: Annotated[list[Path] | None, typer.Option(help="Picture to ask about; repeat for several.")] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(help="mp4, webm, animated picture or folder of frames, shown as pictures; repeat for several."),
    ] = None,
    question: Annotated[str | None, typer.Option("--ask", help="The question.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            "--method",
            help="`seeded-middle` (default), `codebook` (the paper's), another method or preset (see `codebook list`), "
            "`codebook+random`, stages as in `codebook:0.25,random@9:0.05`, or a JSON file of them.",
        ),
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Position ids of kept tokens: keep or compact; default: the schedule's, or keep.")
    ] = None,
    codebook: CodebookOption = None,
    recipe: RecipeOption = None,
    pull: PullOption = False,
    show: Annotated[Path | None, typer.Option(help="Write a picture of what was kept.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", help="JSONL of {image|images, question}; paths relative to it. Run again to resume."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL of answers, or safetensors with --tokens.")] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help="Instead of a model: safetensors of projector outputs (n, d), pruned by --codebook."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions per batch, with --input.")] = 16,
    max_new_tokens: NewTokensOption = 32,
    seed: SeedOption = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first line of --input without an answer.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer questions with most visual tokens dropped.

    Needs --image (or --video) and --ask, or a file of questions (--input and --output). With --tokens, --codebook and
    --output it prunes token embeddings and needs no model.
    """
    from codebook.cli.checks import check_codebook, check_output_file, check_output_picture
    from codebook.inference.samples import check_asked
    from codebook.pruning.plan import Plan
    from codebook.pruning.presets import DEFAULT, KEEP

    if recipe is not None:
        from codebook.cli.recipe import recipe_parts

        _refuse_beside("--recipe", {"--tokens": tokens})
        schedule, codebook = recipe_parts(recipe, schedule, codebook)
    if tokens is not None:
        from codebook.cli.prune_tokens import prune_tokens

        _refuse_beside("--tokens", {"MODEL": model, "--image": image, "--video": video, "--ask": question,
                                    "--input": source, "--show": show, "--schedule": schedule,
                                    **loading.given()})  # fmt: skip
        if codebook is None or output is None:
            raise CodebookError("--tokens needs --codebook DIR and --output FILE")
        check_output_file(output, [tokens])
        check_codebook(codebook, None, pull)
        prune_tokens(tokens, codebook, KEEP if keep is None else keep, output, as_json)
        return
    if model is None:
        raise CodebookError("name a model (`miniature`, a folder or a hub name), or give --tokens")
    plan = Plan(DEFAULT if schedule is None else schedule, keep, positions, codebook, seed)
    if source is not None:
        from codebook.cli.prune_file import prune_file

        _refuse_beside("--input", {"--image": image, "--video": video, "--ask": question, "--show": show})
        if output is None:
            raise CodebookError("--input needs --output FILE")
        check_output_file(output, [source])
        check_codebook(codebook, model, pull)
        loading.check(model)
        prune_file(model, plan, source, output, batch, max_new_tokens, strict, loading, as_json)
        return
    if not (image or video) or question is None:
        raise CodebookError("give --image FILE (or --video FILE) and --ask TEXT, or --input FILE, or --tokens FILE")
    check_asked(question)
    _refuse_beside("--image" if image else "--video", {"--output": output})
    if show is not None:
        check_output_picture(show, [*(image or ()), *(video or ())])
    check_codebook(codebook, model, pull)
    loading.check(model)
    from codebook.cli.prune_pictures import prune_pictures

    prune_pictures(model, plan, image or [], video or [], question, show, max_new_tokens, loading, as_json)


def _refuse_beside(option: str, others: dict[str, Any]) -> None:
    """Refuse options that have no meaning beside `option`."""
    for name, value in others.items():
        if value is not None and value != []:
            raise CodebookError(f"{name} does not go with {option}: leave one of them out")
