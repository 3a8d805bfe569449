"""What the commands say: notes, and the progress of long work."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from codebook import building


@contextlib.contextmanager
def building_progress(total: int) -> Iterator[Callable[[building.Progress], None]]:
    """A bar for `building.build`: images a second, time left, and the funnel so far."""
    with progress("build", total, "images") as tick:

        def show(state: building.Progress) -> None:
            funnel = " -> ".join(f"{step} {count}" for step, count in state.funnel.items())
            skipped = f", {len(state.skipped)} unreadable" if state.skipped else ""
            tick(state.done, funnel + skipped)

        yield show


def note(text: str) -> None:
    print(text, file=sys.stderr)


EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class Update(Protocol):
    def __call__(self, done: int, note: str = "") -> None:
        """Say how many units are done in all, and what else is worth seeing."""


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Update]:
    """Show the progress of `total` units of work."""
    start = time.monotonic()
    first: list[int] = []  # what a resumed run found done does not count towards its speed

    def speed(done: int) -> float:
        first.append(done)
        return (done - first[0]) / max(time.monotonic() - start, 1e-9)

    if sys.stderr.isatty():
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
        )  # fmt: skip
        bar, below = Progress(*columns), Text(style="dim")
        task = bar.add_task(label, total=total, speed="")
        with Live(Group(bar, below), console=Console(stderr=True)):

            def draw(done: int, note: str = "") -> None:
                bar.update(task, completed=done, speed=f"{speed(done):.1f} {unit}/s")
                below.plain = note

            yield draw
        return

    last = [0.0]

    def write(done: int, note: str = "") -> None:
        rate, now = speed(done), time.monotonic()
        if now - last[0] < EVERY and done < total:
            return
        last[0] = now
        left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
        print(
            f"{label}: {done}/{total}, {rate:.1f} {unit}/s{left}{'; ' if note else ''}{note}",
            file=sys.stderr,
            flush=True,
        )

    yield write
