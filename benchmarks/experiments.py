"""Which choice of tokens, with or without mass-preserving attention: experiments on scenes like the training ones.

    python benchmarks/experiments.py --out experiments.jsonl --count 100
    python benchmarks/experiments.py --out deep.jsonl --groups deep --horizon 9 --families count ocr cap

New questions about new scenes of the miniature's training split, so that nothing is chosen by looking at the test
split. Every row runs at every budget, averaged over the layers; one that is out of a row's reach is left out. Each
image is encoded once for all rows. Finished batches are kept in --out: the command can be stopped and run again, with
the same options.
"""

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from codebook import Codebook, Pruner, Schedule, VisualTokens, load, miniature, models, prebuilt
from codebook.analysis.data import of_questions
from codebook.errors import CodebookError
from codebook.evaluation import Plan, Scores, compare, mean, table
from codebook.progress import progress
from codebook.pruning import METHODS
from codebook.pruning.methods.base import group_means, nearest_kept
from codebook.pruning.methods.combine import Combination
from codebook.pruning.presets import HORIZON, scaled
from codebook.pruning.text import make, needs

KEEPS = (0.5, 0.25, 0.11, 0.05)
SELECTORS = (
    "random", "divprune", "codebook", "dart", "cls", "visionzip", "farthest", "codebook-farthest(representatives=0)",
)  # fmt: skip
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
}
MERGED = ", merged"
"""After a row whose kept tokens become the averages of what they stand for."""


@dataclass(frozen=True)
class Merged(Combination):
    """What a pruner keeps, each token the average of itself and the dropped ones most like it."""

    pruner: Pruner

    @property
    def parts(self) -> tuple[Pruner]:
        return (self.pruner,)

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        return self.pruner.select(tokens, keep)

    def merge(self, tokens: VisualTokens, index: Tensor) -> Tensor:
        return group_means(tokens.hidden, nearest_kept(tokens.hidden, index), len(index))


def schedules(
    book: Codebook, n: int, layers: int, rows: list[str], keeps: list[float], horizon: int
) -> dict[str, Schedule | None]:
    """The schedules by budget and row, `unpruned` first; those that cannot meet their budget are left out."""

    def own(name: str) -> Pruner:
        return METHODS[name](book) if needs(name) else make(name)

    found: dict[str, Schedule | None] = {"unpruned": None}
    for keep in keeps:
        for row in rows:
            text = row.removesuffix(MERGED).format(h=horizon)
            try:
                schedule = Schedule.solve(text, own, n=n, layers=layers, keep=keep)
            except CodebookError as error:
                if "out of reach" not in str(error):
                    raise
                continue
            if row.endswith(MERGED):
                stages = [replace(stage, pruner=Merged(stage.pruner)) for stage in schedule.stages]
                schedule = replace(schedule, stages=stages)
            found[f"{keep} {text}{MERGED if row.endswith(MERGED) else ''}"] = schedule
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a finished batch")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--families", nargs="+", choices=miniature.FAMILIES, default=list(miniature.FAMILIES))
    parser.add_argument("--count", type=int, default=100, help="questions a family")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--horizon", type=int, help="layer of the deep stages; default: 20 of 32")
    options = parser.parse_args()
    model, processor = load("miniature")
    (rows, cols), layers = models.family(model).grid(model), len(model.get_decoder().layers)
    named = list(dict.fromkeys(row for group in options.groups for row in GROUPS[group]))  # some are in two groups
    horizon = options.horizon or scaled(HORIZON, layers)
    found = schedules(prebuilt(model), rows * cols, layers, named, options.keep, horizon)
    plans: dict[str, Plan] = {name: partial(_always, schedule) for name, schedule in found.items()}
    questions = of_questions(
        question
        for family in options.families
        for question in miniature.tasks(family, "train", options.seed, options.count)
    )
    with progress("answer", len(plans) * len(questions), "answers") as tick:
        show(compare(model, processor, questions, plans, options.out, tick), options.keep)


def _always(schedule: Schedule | None, asked: object) -> Schedule | None:
    return schedule


def show(results: dict[str, Scores], keeps: list[float]) -> None:
    """One table a budget, the best first."""
    for keep in keeps:
        own = {name.removeprefix(f"{keep} "): scores for name, scores in results.items() if name.startswith(f"{keep} ")}
        print(f"\nkeep {keep}\n")
        print(table({"unpruned": results["unpruned"], **dict(sorted(own.items(), key=lambda item: -mean(item[1])))}))


if __name__ == "__main__":
    main()
