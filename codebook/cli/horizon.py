"""`codebook horizon`: the layer beyond which visual tokens no longer change the answer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from codebook.cli.options import DataOption, JsonOption, Loading, ModelOption, SeedOption, with_groups
from codebook.cli.output import note, progress, resumable
from codebook.errors import CodebookError, counted, unknown


@resumable("out")
@with_groups
def horizon_command(
    model: ModelOption,
    loading: Loading,
    data: DataOption = "miniature",
    out: Annotated[
        Path | None, typer.Option(help="Folder for horizon.json, horizon.png and the journal; run again to resume.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="probability or accuracy of the first telling token, or generated: whole answers.")
    ] = "probability",
    eps: Annotated[float, typer.Option(min=0.0, max=1.0, help="Largest loss that counts as none.")] = 0.01,
    margin: Annotated[
        int | None, typer.Option(min=0, help="Layers added for safety; default: one in sixteen, at least 1.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Samples per task family of the miniature's; default: 50.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which of the miniature's scenes: train (default) or test.")] = None,
    onset: Annotated[
        bool, typer.Option("--onset", help="Also find the first layer whose text attention knows the question.")
    ] = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find the layer beyond which images change no answer, by task."""
    from codebook.analysis import horizon, layer_sweep, plot
    from codebook.analysis import onset as onset_of
    from codebook.cli.checks import check_output_folder
    from codebook.cli.data import is_miniature, load_samples
    from codebook.inference.samples import image_numbers, mixed
    from codebook.models.fingerprint import whole_fingerprint
    from codebook.store.files import replacing, write_text
    from codebook.store.folder import HORIZON_FILE
    from codebook.store.horizons import check_metric

    if metric not in get_args(layer_sweep.SweepMetric):
        raise unknown("no metric", metric, get_args(layer_sweep.SweepMetric))
    if onset and metric == "generated":
        raise CodebookError("--onset measures the first telling token of answers: leave it out, or --metric generated")
    if out is not None:
        check_output_folder(out, (HORIZON_FILE, "horizon.png"))
        check_metric(out / HORIZON_FILE, metric)
    loading.check(model)
    samples = mixed(load_samples(data, loading.frame_rule(model), split, seed, count, 50), seed)
    layer_sweep.check_tasks(sample.task for sample in samples)
    if out is not None:
        plot.require_matplotlib()  # before the long work
    loaded, processor = loading.load(model)
    begins = None
    if onset:
        alone = [sample for sample in samples if len(sample.images) == 1]
        if len(alone) < len(samples):
            note(f"onset: without {counted(len(samples) - len(alone), 'question')} about several images")
        journal = None if out is None else out / "onset.sqlite"
        with progress("onset", len(alone), "samples") as tick:
            agreed = onset_of.agreements(loaded, processor, alone, journal, tick)
        begins = onset_of.onsets([s.task for s in alone], agreed, images=image_numbers(alone), seed=seed)
    journal = None if out is None else out / ("generated.sqlite" if metric == "generated" else "first-token.sqlite")
    with progress("horizon", len(samples), "samples") as tick:
        sweep, cost = layer_sweep.sweep(loaded, processor, samples, cast(Any, metric), journal, tick)
    found = horizon.horizons(sweep, eps, margin=margin, seed=seed)
    own = is_miniature(data)
    report = {
        "model": model, "fingerprint": whole_fingerprint(loaded), "seed": seed,
        "data": data if own else Path(data).name,  # no path of this machine: the file is shared with the codebook
        "split": (split or "train") if own else None,
        "samples": len(samples), "labelled": sum(s.answer is not None for s in samples),
        "layers": sweep.layers, "start": sweep.start, "metric": metric, "eps": eps, "level": horizon.LEVEL,
        "horizons": {task: one.as_json() for task, one in found.items()}, "cost": asdict(cost),
    }  # fmt: skip
    if begins is not None:
        report["onsets"] = {task: one.as_json() for task, one in begins.items()}
    if out is not None:
        with replacing(out / "horizon.png") as temporary:
            plot.draw_horizons(found, sweep.start, metric, temporary)
        write_text(out / HORIZON_FILE, json.dumps(report, indent=1) + "\n")
    if as_json:
        print(json.dumps(report))
        return
    print(horizon.horizon_table(found, sweep.layers))
    if begins is not None:
        print("\n" + onset_of.onset_table(begins))
    if cost.naive:
        note(f"cost: {cost.processed / cost.naive:.1%} of the tokens of a pruned forward for each layer")
    if out is not None:
        note(f"curves: {out / 'horizon.png'}, {out / HORIZON_FILE}")
