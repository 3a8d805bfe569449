"""`codebook calibrate`: a schedule that spends a budget better than its method alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from codebook.cli.options import (
    CodebookOption,
    DataOption,
    FirstOption,
    JsonOption,
    KeepOption,
    Loading,
    ModelOption,
    PullOption,
    SeedOption,
    with_groups,
)
from codebook.cli.output import describe, note, note_costs, progress, resumable
from codebook.errors import CodebookError
from codebook.pruning.presets import DEFAULT


@resumable()
@with_groups
def calibrate_command(
    model: ModelOption,
    loading: Loading,
    keep: KeepOption,
    out: Annotated[Path, typer.Option(help="Schedule file, for `codebook prune --schedule`; run again to resume.")],
    data: DataOption = "miniature",
    method: Annotated[str, typer.Option(help="One method, as `codebook list` names it.")] = DEFAULT,
    first: FirstOption = None,
    deep: Annotated[
        list[str] | None,
        typer.Option(
            help="Another method to try in the deep stage, as in \"fastv(query='question')@11\"; without a layer, at "
            "each. Repeat for several."
        ),
    ] = None,
    drop: Annotated[bool, typer.Option(help="Also try to drop all tokens.")] = True,
    codebook: CodebookOption = None,
    pull: PullOption = False,
    count: Annotated[
        int | None, typer.Option(min=1, help="Samples per task family of the miniature's; default: 100.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find a schedule that makes more of a budget than one method.

    What is found on some questions is confirmed on others; if nothing is, the method alone is written.
    """
    from codebook.analysis import calibration, deep_stages
    from codebook.cli.checks import check_codebook, check_output_file
    from codebook.cli.data import load_samples
    from codebook.cli.methods import codebook_for
    from codebook.inference.samples import mixed
    from codebook.pruning.plan import Plan
    from codebook.store.files import replacing

    # What is impossible with any model is refused before one is loaded.
    plans = [Plan(text, keep, None, codebook, seed) for text in (method, *(first or ()))]
    for plan in plans:
        deep_stages.check_method(plan.schedule)
    for text in deep or ():
        deep_stages.check_deep(text)
    if out.suffix != ".json":
        raise CodebookError(f"{out} would not be read as a schedule: name a .json file")
    check_output_file(out)
    check_codebook(codebook, model, pull)
    loading.check(model)
    samples = load_samples(data, loading.frame_rule(model), None, seed, count, 100)
    ordered = mixed(samples, seed)
    calibration.check_sample_count(ordered)
    loaded, processor = loading.load(model)
    methods = [plan.schedule for plan in plans]
    book = codebook_for(loaded, methods, codebook)
    (plain, found), *others = (
        deep_stages.candidate_schedules(loaded, text, keep, book, drop=drop, deep=deep or (), seed=seed)
        for text in methods
    )
    found += [schedule for alone, deeper in others for schedule in (alone, *deeper)]
    found = list({text: one for one in found if (text := str(one)) != str(plain)}.values())  # each once, however spelt
    journal = out.with_suffix(".journal.sqlite")
    with progress("calibrate", calibration.most_answers(len(found), ordered), "answers") as tick:
        result = calibration.calibrate(loaded, processor, samples, plain, found, seed=seed, file=journal, done=tick)
    report = describe(loaded, result.schedule) | {"plain": str(plain), "data": data, "samples": len(samples)}
    report |= {"confirmed": result.confirmed, "result": str(result), **result.evidence()}
    with replacing(out) as temporary:
        result.schedule.save(temporary)
        temporary.write_text(json.dumps(json.loads(temporary.read_text()) | {"calibration": report}, indent=1) + "\n")
    journal.unlink(missing_ok=True)
    if as_json:
        print(json.dumps(report | {"output": str(out)}))
        return
    print(result)
    note_costs(report, [])
    note(f"saved to {out}")
