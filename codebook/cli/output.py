"""What the commands print and draw: notes, the progress of long work, what a schedule costs, pictures."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol

from codebook.cli.streams import say

if TYPE_CHECKING:
    from PIL import Image

    from codebook import building
    from codebook.models.base import Model
    from codebook.pruning import Schedule

LINE_SECONDS = 10.0
"""Least seconds between progress lines where there is no terminal."""

P = ParamSpec("P")


def note(text: str) -> None:
    """Say something beside the result: to stderr, by the logger that `--quiet` silences."""
    logging.getLogger("codebook.cli").info("%s", text)


def quiet() -> bool:
    """Whether `--quiet` has silenced notes, and so progress too; a script that sets no level has not."""
    return logging.getLogger("codebook").level > logging.INFO


def hide_hub_bars() -> None:
    """Have the client of the Hugging Face Hub draw no bars, unless HF_HUB_DISABLE_PROGRESS_BARS=0 asks for them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not False:  # it would warn that it cannot
        disable_progress_bars()


class Interrupted(Exception):
    """Ctrl-C during a command that goes on when it is run again."""


def resumable(option: str | None = None) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorator of a command that keeps what is finished; with `option`, only if that parameter is given."""

    def decorate(command: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(command)
        def wrapped(*args: P.args, **given: P.kwargs) -> None:
            try:
                command(*args, **given)
            except KeyboardInterrupt:
                if option is not None and given.get(option) is None:
                    raise
                raise Interrupted("interrupted: what is finished is kept, and the same command goes on") from None

        return wrapped

    return decorate


@contextlib.contextmanager
def building_progress() -> Iterator[Callable[[building.Progress], None]]:
    """Progress bar for `building.build`: images per second, time left, and the funnel so far; one for each phase."""
    with contextlib.ExitStack() as opened:
        shown: list[tuple[str, int]] = []
        tick: Update = _no_update

        def show(state: building.Progress) -> None:
            nonlocal tick
            if state.note or shown[-1:] != [(state.phase, state.total)]:
                opened.close()
                shown.append((state.phase, state.total))
                if state.note:
                    note(state.note)
                    return
                tick = opened.enter_context(progress(state.phase, state.total, "images"))
            funnel = " -> ".join(f"{step} {count}" for step, count in state.funnel.items())
            skipped = f", {len(state.skipped)} unreadable" if state.skipped else ""
            tick(state.done, funnel + skipped)

        yield show


@contextlib.contextmanager
def fetching_progress(name: str) -> Iterator[Callable[[int], None]]:
    """Progress of a codebook that is fetched: KiB per second, and the time left. The hub's client draws its own bars.

    Where there is no terminal, its bars are left out: each of their steps would be a line.
    """
    from codebook.store.registry import entry_named

    if not sys.stderr.isatty():
        hide_hub_bars()
    entry = entry_named(name)
    if entry is None:
        yield lambda done: None
        return
    total = -(-sum(file.size for file in entry.files.values()) // 1024)
    with progress(f"fetch {name}", total, "KiB") as tick:
        yield lambda done: tick(-(-done // 1024))


class Update(Protocol):
    """What shows the progress of work."""

    def __call__(self, done: int, note: str = "") -> None:
        """Show how many units are done in all, and `note` beside it."""


def _no_update(done: int, note: str = "") -> None:
    pass


@contextlib.contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Update]:
    """Show the progress of `total` units of work."""
    if quiet():
        yield _no_update
        return
    start = time.monotonic()
    seen: list[tuple[int, float]] = []  # units done and when: first and last

    def speed(done: int) -> float:
        """Units per second up to the last one: what an earlier run finished, and work after it, do not count."""
        if not seen or done != seen[-1][0]:
            seen[1:] = [(done, time.monotonic())]
        return (seen[-1][0] - seen[0][0]) / max(seen[-1][1] - start, 1e-9)

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
                bar.update(task, completed=done, speed=f"{rate:.1f} {unit}/s" if (rate := speed(done)) else "")
                below.plain = note

            yield draw
        return

    last = [0.0]

    def write(done: int, note: str = "") -> None:
        rate, now = speed(done), time.monotonic()
        if now - last[0] < LINE_SECONDS and done < total:
            return
        last[0] = now
        pace = f", {rate:.1f} {unit}/s" if rate else ""  # of what is done at the first sight of it nothing is known
        left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
        say(f"{label}: {done}/{total}{pace}{left}{'; ' if note else ''}{note}")

    yield write


def describe(model: Model, schedule: Schedule) -> dict[str, Any]:
    """A schedule and what it costs on a model, for one image: tokens per layer, their average, FLOPs, KV cache.

    Only its text and the tokens, if under this schedule images keep different numbers of tokens.
    """
    from codebook import models

    size = models.shape(model)
    n, layers = size.tokens, size.layers
    report: dict[str, Any] = {"schedule": str(schedule), "tokens": n}
    if schedule.varies:
        return report
    decoder: dict[str, Any] = {"layers": layers, "attending": size.attending}
    cache = {"kv_heads": size.kv_heads, "head_dim": size.head_size, "bytes": model.dtype.itemsize}
    widths = {"hidden": size.hidden, "intermediate": size.intermediate, "reusing": size.reusing}
    return report | {
        "counts": schedule.counts(n, layers),
        "keep": schedule.budget(n, layers),
        "flops": 1 - schedule.flops_reduction(n, **decoder, **widths),
        "kv_bytes": schedule.kv_bytes(n, **decoder, **cache),
    }


def note_costs(report: dict[str, Any], kept: list[int]) -> None:
    """Say a report of `describe`: what each layer sees, and on another line what that costs.

    `kept` has the tokens that each image kept, if they differ by image; then nobody knows what it costs.
    """
    n = report["tokens"]
    if "counts" not in report:
        numbers = f"kept {', '.join(map(str, kept))}" if kept else "images keep numbers of their own"
        note(f"schedule {report['schedule']}: {numbers} of {n} visual tokens")
        return
    runs: list[str] = []
    start = 0
    for count, group in groupby(report["counts"]):
        end = start + len(list(group))
        of = "" if runs else f" of {n} visual tokens"
        where = f"layer {start}" if end - start == 1 else f"layers {start}-{end - 1}"
        runs.append(f"{count}{of} in {where}")
        start = end
    note(f"schedule {report['schedule']}: {', '.join(runs)}")
    cache = f"{report['kv_bytes'] / 1024:.0f} KiB of KV cache per image"
    note(f"on average {report['keep']:.1%} of the tokens, {report['flops']:.1%} of their prefill FLOPs, {cache}")


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    from codebook.store.files import cannot_write, replacing

    try:
        with replacing(path) as temporary:
            picture.save(temporary, format="PNG")
    except OSError as error:  # of a full disk PIL does not say which file
        raise cannot_write(path, error) from None
