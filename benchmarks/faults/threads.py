"""Threads on one model: every call under any mix of schedules answers as it does alone.

    python -m benchmarks.faults.threads                  # 8 threads, 200 calls each
    python -m benchmarks.faults.threads --threads 16 --calls 1000

On the miniature, in four rounds that share the calls: contexts of single threads and plain calls side by side; the same
inside a context of the model, where a plain call is pruned by that; both with what the tower saw remembered; and tasks
of asyncio in every thread, with contexts of their own. A call is a generation, with or without a cache, or a forward,
of one prompt or of several. Its tokens and logits must equal, bit for bit, those of the same call alone.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from codebook import Schedule, load, remember
from codebook.inference.prompts import prepare
from codebook.miniature.scenes import scene

TEXTS = (
    None,
    "codebook:0.3",
    "random:0.5, fastv@4:10",
    "divprune:0.4+mass",
    "visionzip:0.3, random@6:5+mass",
    "fastv@2:0.2",
)
QUESTIONS = ("how many objects are there?", "read the number.", "describe.")
CALLS = ("generate", "uncached", "forward")
SEED = 0


@dataclass(frozen=True)
class Work:
    """A call: how it is made, of which prompt, under which schedule (0 is none), by their numbers."""

    call: str
    prompt: int
    schedule: int


class Calls:
    """Calls on one model, and their answers alone."""

    def __init__(self) -> None:
        self.model, processor = load("miniature", "cpu")
        pictures = [Image.fromarray(scene("test", 2, SEED, i).pixels) for i in range(3)]
        rows = [[0], [1], [0, 1, 2]]
        asked = [([[pictures[i]] for i in row], [QUESTIONS[i] for i in row]) for row in rows]
        self.prompts = [prepare(self.model, processor, *pair).inputs for pair in asked]
        self.schedules = [None if text is None else Schedule.for_model(self.model, text) for text in TEXTS]
        self.alone = {
            work: self.under(work, "model")
            for work in itertools.starmap(Work, itertools.product(CALLS, range(len(rows)), range(len(TEXTS))))
        }

    def context(self, number: int, scope: str) -> Any:
        schedule = self.schedules[number]
        return contextlib.nullcontext() if schedule is None else schedule(self.model, scope=scope)

    def under(self, work: Work, scope: str) -> Tensor:
        with self.context(work.schedule, scope):
            return self.answer(work)

    def answer(self, work: Work) -> Tensor:
        """Logits of every new token, (B, steps, V), under whatever contexts are open."""
        inputs = self.prompts[work.prompt]
        with torch.no_grad():
            if work.call == "forward":
                return self.model(**inputs).logits[:, -1:]
            return torch.stack(self.model.generate(
                **inputs, max_new_tokens=3, do_sample=False, use_cache=work.call == "generate", output_logits=True,
                return_dict_in_generate=True, eos_token_id=None,
            ).logits, 1)  # fmt: skip

    def right(self, work: Work, answer: Tensor) -> bool:
        return torch.equal(answer, self.alone[work])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=200, help="of each thread")
    options = parser.parse_args()
    torch.set_num_threads(1)
    calls, wrong, start = Calls(), 0, time.perf_counter()
    for name, round_ in ROUNDS.items():
        found = round_(calls, options.threads, options.calls // len(ROUNDS))
        wrong += found
        print(f"{name}: {options.threads} x {options.calls // len(ROUNDS)} calls, {found} wrong", flush=True)
    print(f"{wrong} wrong of {options.threads * (options.calls // len(ROUNDS)) * len(ROUNDS)} calls, "
          f"{len(calls.alone)} different ones, in {time.perf_counter() - start:.0f} s")  # fmt: skip
    raise SystemExit(wrong > 0)


def in_threads(calls: Calls, threads: int, count: int, call: Callable[[Work], Tensor], around: int = 0) -> int:
    """Wrong answers of threads that each make `count` drawn calls; a plain one is pruned by the schedule `around`."""

    def work(thread: int) -> int:
        draw, wrong = random.Random(f"{SEED} {thread}"), 0
        for one in draw.choices(list(calls.alone), k=count):
            answer = call(one)
            expected = Work(one.call, one.prompt, one.schedule or around)
            wrong += not calls.right(expected, answer)
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads)))


def own_contexts(calls: Calls, threads: int, count: int) -> int:
    return in_threads(calls, threads, count, lambda work: calls.under(work, "thread"))


def inside_one(calls: Calls, threads: int, count: int) -> int:
    around = 2
    with calls.context(around, "model"):
        return in_threads(calls, threads, count, lambda work: calls.under(work, "thread"), around)


def remembered(calls: Calls, threads: int, count: int) -> int:
    def call(work: Work) -> Tensor:
        with remember(calls.model):
            return calls.under(work, "thread")

    around = 3
    with remember(calls.model), calls.context(around, "model"):
        return in_threads(calls, threads, count, call, around)


def in_tasks(calls: Calls, threads: int, count: int) -> int:
    """In every thread a loop with three tasks, which take turns while their contexts are open."""

    async def task(draw: random.Random, count: int) -> int:
        wrong = 0
        for one in draw.choices(list(calls.alone), k=count):
            with calls.context(one.schedule, "thread"):
                await asyncio.sleep(0)
                wrong += not calls.right(one, calls.answer(one))
        return wrong

    async def tasks(thread: int) -> int:
        shares = [len(range(i, count, 3)) for i in range(3)]
        return sum(await asyncio.gather(*(task(random.Random(f"{thread} {i}"), n) for i, n in enumerate(shares))))

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda thread: asyncio.run(tasks(thread)), range(threads)))


ROUNDS = {
    "contexts of threads": own_contexts,
    "inside a context of the model": inside_one,
    "remembered": remembered,
    "asyncio tasks": in_tasks,
}


if __name__ == "__main__":
    main()
