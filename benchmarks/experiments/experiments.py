"""Which choice of tokens, with or without mass-preserving attention: experiments on scenes like the training ones.

    python -m benchmarks.experiments.experiments --out experiments.jsonl --count 100
    python -m benchmarks.experiments.experiments --out deep.jsonl --groups deep --horizon 9 --families count ocr cap
    python -m benchmarks.experiments.experiments --out films.jsonl --model eyes --groups films --families video

New questions about new scenes of the miniature's training split, so that nothing is chosen by looking at the test
split. Every row runs at every budget, averaged over the layers; one that is out of a row's reach is left out. Each
image is encoded once for all rows. Finished batches are kept in --out: the command can be stopped and run again, also
with other options. A row is a schedule's text, and behind a comma what is tried with it (`trials.py`).
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.experiments import trials
from codebook import Merged, Pruner, Schedule, SeededFarthestPoint, load, miniature, models, prebuilt
from codebook.cli.output import progress
from codebook.errors import CodebookError
from codebook.evaluation import Scores, accuracy_table, mean, scored, standard_error
from codebook.inference.respond import BATCH_SIZE, Policy, Response, respond
from codebook.inference.samples import Sample
from codebook.inference.uncertainty import NORMAL_QUANTILE
from codebook.miniature.samples import of_questions
from codebook.pruning.presets import HORIZON, scaled

KEEPS = (0.5, 0.25, 0.11, 0.05)
SELECTORS = (
    "random", "divprune", "codebook", "dart", "cls", "visionzip", "farthest", "codebook-farthest(representatives=0)",
)  # fmt: skip
OWN = ("codebook", "codebook-farthest+mass")
SHARES = (0.5, 0.25)
GROUPS = {
    "selection": SELECTORS,
    "mass": tuple(f"{row}+mass" for row in SELECTORS),
    "representatives": (
        *(f"codebook-farthest(representatives={r})+mass" for r in (1, 2, 8)),
        *(
            "codebook-farthest+mass",
            "codebook-farthest",
            "farthest(representatives=4)",
            "farthest(representatives=4)+mass",
        ),
    ),
    "deep": tuple(
        first + deep
        for first in ("divprune", "divprune+mass", "codebook-farthest+mass")
        for deep in ("", "+random@{h}", "+random@{h}+mass", "+drop@{h}")
    ),
    "merging": tuple(
        row + merged for row in ("divprune", "divprune+mass", "codebook-farthest+mass") for merged in ("", ", merged")
    ),
    "codebooks": tuple(row + book for row in OWN for book in ("", ", no isolation", ", no recurrence", ", neither")),
    "prompts": tuple(row + book for row in OWN for book in (", no recurrence", ", count too", ", count and read too")),
    "by-gain": (OWN[1], *(f"{OWN[1]}, gain {gain}" for gain in (0.02, 0.01, 0.005, 0.002))),
    "by-image": (OWN[1], *(f"{OWN[1]}, by scores {power}" for power in (0.5, 1.0, 2.0))),
    "asked": (OWN[1], "cdpruner", *(f"{OWN[1]}, asked {power}" for power in (0.25, 0.5, 1.0))),
    "not-asked": (OWN[1], *(f"{OWN[1]}, {asked} {power}" for asked in ("asked", "not asked") for power in (0.5, 1.0))),
    "then": (
        OWN[1],
        *(f"{OWN[1]}+{own}@{at}:{s}+mass" for own in ("fastv", "sparsevlm") for at in (3, 6, 9) for s in SHARES),
    ),
    "peers": (
        *("random", "uniform", "divprune", "cdpruner", "cen-divprune", "cen-cdpruner", "anchorprune", "tops", "scope"),
        *("score", "nuwa", "divprune-window", "coverpruner@1", OWN[1], "codebook-farthest(centred=True)+mass"),
    ),
    "text": (
        OWN[1],
        *(f"{OWN[1]}+fastv(query='question')@{at}:0.5+mass" for at in (5, 6, 7, 8)),
        f"{OWN[1]}+fastv(query='question')@7:0.5",
        f"{OWN[1]}+fastv(query='question')@7:0.25+mass",
    ),
    "middle": (
        *(OWN[1], "seeded-middle", "seeded-middle;spread=codebook", "seeded-middle(representatives=2);spread=codebook"),
        *("divprune(middle=True)+mass", "seeded-middle+fastv(query='question')@6:0.65+mass;spread=codebook"),
    ),
    "demand": ("seeded-middle", *(f"seeded-middle, demand {power}" for power in (0.5, 1.0))),
    "anchor": ("seeded-middle", *(f"seeded-middle, anchor {most}" for most in (0.125, 0.25))),
    "asked-middle": (
        *("seeded-middle", *(f"seeded-middle, asked {power}" for power in (0.5, 1.0, 2.0))),
        *("seeded-middle, not asked 1.0", "cdpruner", "cdpruner+mass"),
    ),
    "asked-plain": ("seeded-middle", "codebook-middle", "codebook-middle, asked 1.0", "codebook-farthest, asked 1.0"),
    "volume": ("seeded-middle", "codebook-middle", "codebook-middle, asked 1.0", "cdpruner"),
    "gate": (
        OWN[1],
        *(f"{OWN[1]}, gate {power}" for power in (1.0, 2.0, 3.0)),
        "codebook-farthest(representatives=2)+mass, gate 2.0",
        f"{OWN[1]};spread=codebook",
        "codebook-farthest(representatives=2)+mass;spread=codebook, gate 2.0",
    ),
    "restore": (
        *("divprune", "divprune+mass", "divprune+distance", "divprune-merged+mass", "restore", OWN[1]),
        "codebook-farthest+distance",
    ),
    "median": ("divprune+mass", "divprune-merged+mass", "restore", OWN[1], f"{OWN[1]}, median"),
    "signals": (OWN[1], *(f"{OWN[1]}, by {signal} 1.0" for signal in trials.SIGNALS)),
    "films": (OWN[1], *(f"{OWN[1]}, film {trial}" for trial in trials.FILMS)),
}


def schedules(
    model, processor, rows: list[str], keeps: list[float], horizon: int, folder: Path
) -> dict[str, Schedule | None]:
    """The schedules by budget and row, `unpruned` first; those that cannot meet their budget are left out."""
    (height, width), layers = models.family(model).grid(model), len(model.get_decoder().layers)
    shape, shipped = {"n": height * width, "layers": layers}, prebuilt(model)
    tried = {trial for row in rows if (trial := row.partition(", ")[2]) in trials.BOOKS}
    books = trials.books(model, processor, folder, sorted(tried))

    def replaced(pruner: Pruner, trial: str, keep: int) -> tuple[Pruner, int | None]:
        kind, _, number = trial.rpartition(" ")
        if trial.startswith("film "):
            return trials.Film(shipped, **trials.FILMS[trial.removeprefix("film ")]), keep
        if trial == "merged":
            return trials.Merged(pruner), keep
        if trial == "median":
            return Merged(pruner), keep
        if kind == "gain":
            return trials.ByGain(shipped, float(number)), keep
        if kind == "asked":
            return trials.Asked(shipped, float(number), middle=_in_the_middle(pruner)), keep
        if kind == "demand":
            return trials.Demanded(shipped, float(number)), keep
        if kind == "anchor":
            return trials.Anchored(shipped, float(number)), keep
        if kind == "not asked":
            words = model.get_input_embeddings().weight.detach()
            return trials.Asked(shipped, float(number), words, middle=_in_the_middle(pruner)), keep
        assert isinstance(pruner, SeededFarthestPoint)
        if kind == "gate":
            return trials.Gated(shipped, pruner.representatives, power=float(number)), keep
        signal = kind.removeprefix("by ")
        return trials.by_image(model, processor, shipped, keep, signal, float(number)), None

    found: dict[str, Schedule | None] = {"unpruned": None}
    for keep in keeps:
        for row in rows:
            text, _, trial = row.format(h=horizon).partition(", ")
            try:
                schedule = Schedule.solve(text, books.get(trial, shipped), keep=keep, **shape)
            except CodebookError as error:
                if "out of reach" not in str(error):
                    raise
                continue
            if trial and trial not in books:
                [stage] = schedule.stages
                pruner, count = replaced(stage.pruner, trial, stage.count(shape["n"]))
                schedule = replace(schedule, stages=[replace(stage, pruner=pruner, keep=count)])
            found[f"{keep} {row.format(h=horizon)}"] = schedule
    return found


def _in_the_middle(pruner: Pruner) -> bool:
    return isinstance(pruner, SeededFarthestPoint) and pruner.middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a finished batch")
    parser.add_argument("--model", default="miniature", choices=("miniature", "eyes"))
    parser.add_argument("--dtype", default="float32", help="of the model, as bfloat16")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--families", nargs="+", choices=miniature.TASK_FAMILIES, default=list(miniature.TASK_FAMILIES))
    parser.add_argument("--count", type=int, default=100, help="questions a family")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--batch", type=int, default=BATCH_SIZE, help="questions a batch")
    parser.add_argument("--books", type=Path, default=Path("books"), help="folder for the codebooks that are tried")
    parser.add_argument("--horizon", type=int, help="layer of the deep stages; default: 20 of 32")
    parser.add_argument("--against", default=OWN[1], help="row from which the others' differences are shown")
    options = parser.parse_args()
    model, processor = load(options.model, dtype=options.dtype)
    named = list(dict.fromkeys(row for group in options.groups for row in GROUPS[group]))  # some are in two groups
    horizon = options.horizon or scaled(HORIZON, models.shape(model).layers)
    found = schedules(model, processor, named, options.keep, horizon, options.books)
    plans: dict[str, Policy] = {name: partial(_always, schedule) for name, schedule in found.items()}
    questions = of_questions(
        question
        for family in options.families
        for question in miniature.tasks(family, "train", options.seed, options.count)
    )
    with progress("answer", len(plans) * len(questions), "answers") as tick:
        said = respond(model, processor, questions, plans, options.out, tick, batch=options.batch)
    show(questions, said, options.keep, options.against)


def _always(schedule: Schedule | None, asked: object) -> Schedule | None:
    return schedule


def show(questions: list[Sample], said: dict[str, list[Response]], keeps: list[float], against: str) -> None:
    """One table a budget, the best first."""
    results: dict[str, Scores] = {name: scored(questions, own) for name, own in said.items()}
    for keep in keeps:
        own = {name.removeprefix(f"{keep} "): scores for name, scores in results.items() if name.startswith(f"{keep} ")}
        print(f"\nkeep {keep}\n")
        best_first = dict(sorted(own.items(), key=lambda item: -mean(item[1])))
        print(accuracy_table({"unpruned": results["unpruned"], **best_first}))
        for name, scores in best_first.items():
            if against in own and name != against:
                print(f"{name}: {_apart(scores, own[against])}")
        for name in own:
            if ", by " in name:
                kept = [one.counts[-1] / one.counts[0] for one in said[f"{keep} {name}"]]
                print(f"\n{name}: kept {sum(kept) / len(kept):.4f}, from {min(kept):.4f} to {max(kept):.4f}")


def _apart(scores: Scores, other: Scores) -> str:
    """The paired difference of two rows' means, in points, with its 95% interval."""
    apart = {
        task: replace(own, values=[a - b for a, b in zip(own.values, other[task].values, strict=True)])
        for task, own in scores.items()
    }
    error = standard_error(apart)
    return f"{100 * mean(apart):+.1f} ± {'unknown' if error is None else format(100 * NORMAL_QUANTILE * error, '.1f')}"


if __name__ == "__main__":
    main()
