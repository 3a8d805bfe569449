"""Where the miniature stops reading its images, and what calibrated random pruning behind that horizon is worth.

    python -m benchmarks.experiments.horizon --out FOLDER

Run again, it goes on where it was. Held-out questions measure and never tune: schedules are calibrated, once, on scenes
of the train split. Each seed then has its own held-out questions and draws its own random tokens. Prints Markdown, and
writes FOLDER/horizon.json.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.cost.timing import machine
from codebook import miniature, models
from codebook.analysis import Sweep, calibration, horizon, sweep
from codebook.analysis.deep_stages import candidate_schedules
from codebook.cli.output import progress
from codebook.evaluation import evaluate
from codebook.evaluation.rows import reseeded
from codebook.inference import samples as data
from codebook.inference.uncertainty import plus_minus
from codebook.miniature.samples import of_miniature, of_questions
from codebook.pruning import Schedule, remember
from codebook.store.files import replacing
from codebook.store.journal import Journal
from codebook.store.shipped import find_codebook

METHODS = ("codebook", "divprune", "dart", "fastv", "seeded")
KEEPS = (0.5, 0.25, 0.11)
BATCH = 32
VARIANTS = ("alone", "fixed", "calibrated")
"""Fixed: a random seventh from layer 20 of 32 on, the paper's for LLaVA-1.5-7B (arXiv 2512.07580)."""


def horizons(model, processor, options: argparse.Namespace) -> dict[str, dict]:
    """Of each task family, by two metrics, over all seeds."""
    found = {}
    for metric in ("probability", "accuracy"):
        sweeps = []
        for seed in options.seeds:
            samples = of_miniature("test", seed, options.questions, options.families)
            with progress(f"horizon, {metric}, seed {seed}", len(samples), "samples") as tick:
                file = options.out / f"sweep-{seed}.sqlite"
                sweeps.append(sweep(model, processor, samples, metric, file, tick)[0])
        whole = Sweep(
            [task for one in sweeps for task in one.tasks],
            np.concatenate([one.full for one in sweeps]),
            np.concatenate([one.pruned for one in sweeps]),
        )
        found[metric] = horizon.horizons(whole, options.eps)
    return found


def schedules(model, processor, options: argparse.Namespace) -> dict[tuple[str, float], dict[str, Schedule]]:
    """Of each method and budget: alone, with the paper's deep stage, and calibrated."""
    found, seed = {}, 0  # of the calibration, whatever seeds measure
    samples = of_miniature("train", seed, options.calibration, options.families)
    size, codebook = models.shape(model), find_codebook(model, options.codebook)
    for method in METHODS:
        for keep in KEEPS:
            plain, candidates = candidate_schedules(model, method, keep, codebook, seed=seed)
            work = calibration.most_answers(len(candidates), samples)
            with progress(f"calibrate {method} at {keep}", work, "answers") as tick:
                file = options.out / f"calibration-{method}-{keep}-{seed}.sqlite"
                result = calibration.calibrate(
                    model, processor, samples, plain, candidates, seed=seed, file=file, done=tick
                )
            fixed = Schedule.solve(f"{method}+random", codebook, keep=keep, n=size.tokens, layers=size.layers)
            found[method, keep] = {"alone": plain, "fixed": fixed, "calibrated": result.schedule}
    return found


def answers(model, processor, options: argparse.Namespace, seed: int, plans: list[Schedule]) -> dict[str, np.ndarray]:
    """Scores (questions,) of each schedule on the held-out questions, in the order of `questions`."""
    asked = list(questions(options.questions, seed, options.families))
    about = {"model": models.identity(model), "families": options.families, "questions": len(asked), "seed": seed}
    values: dict[str, list[float]] = {}
    with (
        Journal(options.out / f"held-out-{seed}.sqlite", about) as journal,
        progress(f"held-out, seed {seed}", len(plans) * sum(map(len, asked)), "answers") as tick,
    ):
        done = 0
        for i, group in enumerate(asked):
            with remember(model):
                for plan in plans:
                    if (name := f"{i} {plan}") not in journal:
                        [scores] = evaluate(model, processor, group, plan).values()
                        journal.add(name, scores.values)
                    values.setdefault(str(plan), []).extend(journal[name])
                    tick(done := done + len(group))
    return {plan: np.array(scores) for plan, scores in values.items()}


def questions(count: int, seed: int, families: Sequence[str]) -> Iterator[list[data.Sample]]:
    """Held-out questions, in batches of one family."""
    for family in families:
        own = of_questions(miniature.tasks(family, "test", seed, count))
        yield from (own[start : start + BATCH] for start in range(0, count, BATCH))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean over families of values (families, questions), and the half width of its 95% interval."""
    error = (values.var(1, ddof=1) / values.shape[1]).sum() ** 0.5 / len(values)
    return float(values.mean()), float(1.96 * error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of journals and results")
    parser.add_argument("--questions", type=int, default=200, help="held-out, a family and seed")
    parser.add_argument("--families", nargs="+", choices=miniature.TASK_FAMILIES, default=list(miniature.TASK_FAMILIES))
    parser.add_argument("--calibration", type=int, default=100, help="samples a family, of the train split")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eps", type=float, default=horizon.EPS)
    parser.add_argument("--codebook", type=Path, help="default: the one that ships")
    options = parser.parse_args()
    model, processor = models.load("miniature")
    layers, found = models.shape(model).layers, horizons(model, processor, options)
    calibrated = schedules(model, processor, options)
    by_seed, unpruned = [], Schedule([])
    for seed in options.seeds:
        plans = {
            cell: {variant: next(reseeded(schedule, [seed])) for variant, schedule in own.items()}
            for cell, own in calibrated.items()
        }
        every = {str(s): s for s in [unpruned, *(s for own in plans.values() for s in own.values())]}
        by_seed.append((plans, answers(model, processor, options, seed, list(every.values()))))

    def scores(method: str, keep: float, variant: str) -> np.ndarray:
        """(families, questions of all seeds)."""
        rows = [own[str(plans[method, keep][variant])] for plans, own in by_seed]
        return np.concatenate([row.reshape(len(options.families), -1) for row in rows], 1)

    report = {**machine("cpu"), "questions": options.questions, "calibration": options.calibration,
              "seeds": options.seeds, "eps": options.eps,
              "horizons": {metric: {task: one.as_json() for task, one in own.items()} for metric, own in found.items()},
              "rows": []}  # fmt: skip
    count = len(options.seeds) * options.questions
    print(f"## Horizon by family\n\n{count} held-out questions a family, eps {options.eps}, {layers} layers; 95% "
          "interval.\n\n| family | by probability | safe from | by accuracy | safe from |\n"
          "|---|---|---|---|---|")  # fmt: skip
    for task, one in found["probability"].items():
        cells = [f"{h.layer} [{h.interval[0]}, {h.interval[1]}] | {h.safe}" for h in (one, found["accuracy"][task])]
        print(f"| {task} | {' | '.join(cells)} |")
    full = np.concatenate([own[str(unpruned)].reshape(len(options.families), -1) for _, own in by_seed], 1)
    print(f"\n## Equal budgets\n\nScore, percent, mean over families, 95% interval; unpruned "
          f"{percent(*interval(full))}. Differences are paired, to the method alone.\n\n"
          "| method | keep | alone | fixed | calibrated | fixed - alone | calibrated - alone | schedule |\n"
          "|---|---|---|---|---|---|---|---|")  # fmt: skip
    for keep in KEEPS:
        for method in METHODS:
            own = {variant: scores(method, keep, variant) for variant in VARIANTS}
            cells = {variant: interval(values) for variant, values in own.items()}
            cells |= {f"{v} - alone": interval(own[v] - own["alone"]) for v in VARIANTS[1:]}
            chosen = {variant: str(schedule) for variant, schedule in calibrated[method, keep].items()}
            shown = " | ".join(percent(*cell) for cell in cells.values())
            print(f"| {method} | {keep} | {shown} | {chosen['calibrated']} |")
            families = {v: dict(zip(options.families, x.mean(1).tolist(), strict=True)) for v, x in own.items()}
            report["rows"].append({
                "method": method, "keep": keep, "scores": cells, "families": families, "schedules": chosen,
            })  # fmt: skip
    with replacing(options.out / "horizon.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")


def percent(mean: float, half: float) -> str:
    return f"{100 * mean:.1f} {plus_minus(None if math.isnan(half) else 100 * half)}"


if __name__ == "__main__":
    main()
