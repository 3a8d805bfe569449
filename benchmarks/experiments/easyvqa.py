"""What nobody here drew: easy-VQA's test questions, asked of a model that ships, unpruned and pruned.

    pip download --no-deps easy-vqa==1.0 && unzip -q easy_vqa-1.0-py3-none-any.whl
    python -m benchmarks.experiments.easyvqa eyes easy_vqa/data --count 80 --out runs/easyvqa-eyes
    python -m benchmarks.experiments.easyvqa miniature easy_vqa/data --count 80 --out runs/easyvqa-miniature

Questions and answers are taken as they are. A question that the model refuses, for a word that it does not know, is
left out and counted; no word stands for another. The floors: the questions without their images, and the answer that is
the most frequent of its kind in easy-VQA's training split. Intervals are 95%, over images. Answers are kept in --out:
the command can be stopped and run again.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from codebook import Schedule, load, models, prebuilt
from codebook.cli.output import progress
from codebook.errors import CodebookError
from codebook.evaluation.datasets import EASY_ANSWERS, load_tasks
from codebook.evaluation.metrics import Estimate, Task, estimate, mean_of, numbers_of_groups
from codebook.inference.prompts import check_samples
from codebook.inference.respond import respond
from codebook.inference.uncertainty import NORMAL_QUANTILE, plus_minus
from codebook.miniature.tasks import vocabulary

METHODS = ("seeded-middle", "seeded", "divprune", "uniform", "random")
FULL, BLIND, CONSTANT = "unpruned", "no image", "the most frequent answer"


def askable(model, processor, task: Task) -> Task:
    """The task without the questions that the model refuses."""

    def taken(sample) -> bool:
        try:
            check_samples(model, processor, [sample])
        except CodebookError:
            return False
        return True

    return replace(task, samples=[sample for sample in task.samples if taken(sample)])


def most_frequent(folder: Path) -> dict[str, str]:
    """For each kind of question the most frequent answer of the training split."""
    counts = Counter(answer for _, answer, _ in json.loads((folder / "train" / "questions.json").read_text()))
    return {f"easyvqa {kind}": max(among, key=counts.__getitem__) for kind, among in EASY_ANSWERS.items()}


def cells(estimates: Sequence[Estimate], images: Sequence[np.ndarray]) -> list[str]:
    mean, error = mean_of(estimates, images)
    half = None if error is None else 100 * NORMAL_QUANTILE * error
    return [*(f"{100 * one.value:.1f}" for one in estimates), f"{100 * mean:.1f} {plus_minus(half)}"]


def estimates(tasks: Sequence[Task], texts: Mapping[str, Sequence[str]]) -> list[Estimate]:
    return [estimate(task.metric, task.sums(texts[task.name])) for task in tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, help="easy_vqa/data of the package")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=80, help="questions of each kind, whole images")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.11])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, processor = load(options.model, "cpu")
    whole = load_tasks([f"easyvqa:{options.folder}"])
    for task in whole:
        print(f"{task.name}: {len(askable(model, processor, task).samples)} of {len(task.samples)} questions are taken")
    drawn = load_tasks([f"easyvqa:{options.folder}"], options.count, options.seed)
    tasks = [task for task in (askable(model, processor, task) for task in drawn) if task.samples]
    print(", ".join(f"{task.name}: {len(task.samples)}" for task in tasks))

    book, (rows, cols), layers = prebuilt(model), models.family(model).grid(model), models.shape(model).layers
    plans = {FULL: lambda asked: None}
    for keep in options.keep:
        for method in options.methods:
            schedule = Schedule.solve(method, book, keep=keep, n=rows * cols, layers=layers)
            plans[f"{method} {keep:g}"] = lambda asked, schedule=schedule: schedule
    samples = [sample for task in tasks for sample in task.samples]
    options.out.mkdir(parents=True, exist_ok=True)
    ask = partial(respond, model, processor, samples, max_new_tokens=8)
    with progress("easy-VQA", len(samples) * (len(plans) + 1), "answers") as tick:
        found = ask(plans, options.out / "answers.sqlite", tick)
        found |= ask({BLIND: plans[FULL]}, options.out / "blind.sqlite", blind=True)

    def by_task(texts: Sequence[str]) -> dict[str, list[str]]:
        left = iter(texts)
        return {task.name: [next(left) for _ in task.samples] for task in tasks}

    said = {name: by_task([one.text for one in own]) for name, own in found.items()}
    constant = most_frequent(options.folder)
    said[CONSTANT] = {task.name: [constant[task.name]] * len(task.samples) for task in tasks}
    full, images = estimates(tasks, said[FULL]), numbers_of_groups(tasks)
    print(f"\n| | {' | '.join(task.name.removeprefix('easyvqa ') for task in tasks)} | mean | against unpruned |")
    print(f"|---|{'---|' * (len(tasks) + 2)}")
    for name, texts in said.items():
        own = estimates(tasks, texts)
        change = cells([a - b for a, b in zip(own, full, strict=True)], images)[-1] if name != FULL else ""
        print(f"| {name} | {' | '.join(cells(own, images))} | {change} |")
    words = set(vocabulary())
    print("\nunpruned, by whether every word of question and answer is one of the trained ones:")
    for task in tasks:
        rows_of = {True: [], False: []}
        for sample, text in zip(task.samples, said[FULL][task.name], strict=True):
            known = {*sample.question.rstrip("?").split(), sample.answer} <= words
            rows_of[known].append(sample.score(text))
        print(task.name, *(f"{'trained' if k else 'other'} words: {sum(v):g} of {len(v)}" for k, v in rows_of.items()))
        pairs = Counter((s.answer, t) for s, t in zip(task.samples, said[FULL][task.name], strict=True))
        print("  ", ", ".join(f"{a} -> {t}: {n}" for (a, t), n in pairs.most_common(12)))


if __name__ == "__main__":
    main()
