"""The information horizon's worth on `eyes`: methods alone, and with few or no visual tokens behind its measured layer.

    python -m benchmarks.experiments.eyes --out FOLDER
    python -m benchmarks.experiments.eyes --out FOLDER --part 1/2

Held-out questions of nine families about one image, at equal budgets over the layers. Every method at every budget:
alone; with a random seventh from layer 24 on; with nothing from there on. Some also with the second stage where 20 of
32 layers scale to, 19, or 21 of 32, 20. The last table says whether methods rank as on the miniature, whose figures are
in benchmarks/publish/miniature.json.

Each --part answers its share of the questions; without it, what is missing is answered too, and the tables are printed
as Markdown and written to FOLDER/eyes.json. Run again, it goes on where it was.
"""

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from codebook import load, models
from codebook.cli.data import load_data
from codebook.cli.output import progress
from codebook.evaluation.metrics import Estimate, estimate, mean_of
from codebook.evaluation.rows import plan, schedule_key
from codebook.inference.respond import respond
from codebook.inference.uncertainty import NORMAL_QUANTILE
from codebook.store.files import replacing

FAMILIES = ("exist", "attr", "count", "loc", "box", "ocr", "rel", "word", "cap")
METHODS = ("seeded", "divprune", "codebook", "uniform", "random", "cdpruner", "fastv@1", "dart@1")
BEHIND = ("+random@24", "+drop@24")
"""What is left behind the horizon, which `codebook horizon` measured: docs/eyes.md."""
SCALED = ("seeded+random@19", "seeded+drop@20", "divprune+random@19", "codebook+random@19", "dart@1+random@19")
KEEPS = (0.5, 0.25, 0.11, 0.05)
BATCH = 10
MINIATURE = Path(__file__).parents[1] / "publish" / "miniature.json"


class Answers:
    """Scores of all rows on the same questions."""

    def __init__(self, tasks, rows, responses) -> None:
        self.tasks = tasks
        self.rows = {(row.method, row.keep): row for row in rows}
        self.responses = responses

    @functools.cache  # noqa: B019 - lives as long as the run
    def estimates(self, method: str, keep: float) -> list[Estimate]:
        """Of each family."""
        found, start = [], 0
        texts = [one.text for one in self.responses[schedule_key(self.rows[method, keep].schedules[0])]]
        for task in self.tasks:
            stop = start + len(task.samples)
            found.append(estimate(task.metric, task.sums(texts[start:stop])))
            start = stop
        return found

    def score(self, method: str, keep: float) -> tuple[float, float]:
        """Mean over the families and half its 95% interval, in percent."""
        return _percent(self.estimates(method, keep))

    def over(self, method: str, other: str, keep: float, other_keep: float | None = None) -> tuple[float, float]:
        """The paired difference of two rows, and half its interval."""
        pairs = zip(
            self.estimates(method, keep), self.estimates(other, keep if other_keep is None else other_keep), strict=True
        )
        return _percent([a - b for a, b in pairs])


def _percent(estimates: Sequence[Estimate]) -> tuple[float, float]:
    value, error = mean_of(estimates)
    assert error is not None
    return 100 * value, 100 * NORMAL_QUANTILE * error


def tables(answers: Answers) -> dict[str, list[list[str]]]:
    """Tables by title, the first row of each its head."""

    def cell(pair: tuple[float, float], sign: str = "") -> str:
        value, half = pair
        # The half-width would be the rule of three's for so many questions: 3 in n.
        return "none differs" if sign and not value else f"{value:{sign}.1f} ± {half:.1f}"

    def or_dash(show, *row: object) -> str:
        return show(*row) if (row[0], row[-1]) in answers.rows else "-"

    head = ["method", *(f"{keep:g}" for keep in KEEPS)]
    every = [m + end for m in METHODS for end in ("", *BEHIND)] + [*SCALED, "downsample"]
    scores = [[m, *(or_dash(lambda m, k: cell(answers.score(m, k)), m, k) for k in KEEPS)] for m in every]
    gains = [
        [m + end, *(or_dash(lambda m, o, k: cell(answers.over(m, o, k), "+"), m + end, m, k) for k in KEEPS)]
        for m in METHODS
        for end in BEHIND
    ]
    guesses = [
        [m, *(or_dash(lambda m, o, k: cell(answers.over(m, o, k), "+"), m, m.split("+")[0], k) for k in KEEPS)]
        for m in SCALED
    ]
    lost = [
        [m, *(or_dash(lambda m, k: cell(answers.over(m, "unpruned", k, 1.0), "+"), m, k) for k in KEEPS)]
        for m in (*METHODS, "downsample")
    ]
    by_family = [
        [m, *(f"{100 * one.value:.0f}" for one in answers.estimates(m, 0.11))]
        for m in every
        if (m, 0.11) in answers.rows
    ]
    return {
        f"score, unpruned {cell(answers.score('unpruned', 1.0))}": [head, *scores],
        "behind the measured horizon, less the method alone": [head, *gains],
        "behind the scaled layer, less the method alone": [head, *guesses],
        "alone, less unpruned": [head, *lost],
        "by family at 0.11": [["method", *FAMILIES], *by_family],
        "rank correlation with the miniature": [["", *head[1:]], *ranks(answers)],
    }


def ranks(answers: Answers) -> list[list[str]]:
    """Spearman's, over the methods alone and `downsample`; both instruments on the same nine families."""
    published = json.loads(MINIATURE.read_text())["rows"]
    names = {m: m.removesuffix("@1") for m in (*METHODS, "downsample")}

    def there(method: str, keep: float) -> float | None:
        own = [row for row in published if row["method"] == names[method] and row["keep"] == keep]
        return float(np.mean([own[0]["tasks"][family]["score"] for family in FAMILIES])) if own else None

    row, apart = ["Spearman's rho"], ["ranked higher here by two or more"]
    for keep in KEEPS:
        both = [m for m in names if (m, keep) in answers.rows and there(m, keep) is not None]
        here = [answers.score(m, keep)[0] for m in both]
        theirs = [there(m, keep) for m in both]
        row.append(f"{spearmanr(here, theirs).statistic:.2f} ({len(both)} methods)")
        moved = np.argsort(np.argsort(here)) - np.argsort(np.argsort(theirs))
        apart.append(", ".join(m for m, by in zip(both, moved, strict=True) if by >= 2) or "none")
    return [row, apart]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=30, help="questions per family")
    parser.add_argument("--part", help="K/N: only this share of the answers, and no tables")
    options = parser.parse_args()
    shard = None if options.part is None else tuple(map(int, options.part.split("/")))
    model, processor = load("eyes")
    tasks = load_data([f"miniature:{family}" for family in FAMILIES], options.count)
    methods = [m + end for m in METHODS for end in ("", *BEHIND)] + list(SCALED)
    rows, skipped = plan(model, methods, KEEPS)
    for one in skipped:
        print(f"{one['method']} at {one['keep']}: {one['reason']}")
    policies = {schedule_key(schedule): (lambda group, own=schedule: own) for row in rows for schedule in row.schedules}
    samples = [sample for task in tasks for sample in task.samples]
    options.out.mkdir(parents=True, exist_ok=True)
    with progress("eyes", len(policies) * len(samples), "answers") as tick:
        responses = respond(
            model, processor, samples, policies, options.out / "answers.sqlite", tick, batch=BATCH, shard=shard
        )
    if shard is not None:
        return
    found = tables(Answers(tasks, rows, responses))
    about = {"model": models.identity(model), "questions": options.count, "families": FAMILIES, "tables": found}
    with replacing(options.out / "eyes.json") as temporary:
        temporary.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    for title, table in found.items():
        print(f"\n{title}\n")
        print("| " + " | ".join(table[0]) + " |\n|" + "---|" * len(table[0]))
        for line in table[1:]:
            print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
