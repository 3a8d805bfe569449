"""Spoiled files of every kind that the package reads: each is taken, or refused in one line; nothing in them is run.

    python -m benchmarks.faults.mutate --cases 20000
    python -m benchmarks.faults.mutate --from 1234 --cases 1   # one case again

A case is a number: it draws a subject, copies its good example, spoils one file (`mutations.py`), and reads the copy as
a user would. Wrong are: any error but a CodebookError or exit code 2; a message that is longer than MESSAGE, of several
lines or with control characters; a process that dies; a read of more than SECONDS; and code that was in a file and ran.
Prints the counts, the slowest case, the peak memory and, if any, what went wrong; ends with 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.mutations import spoil
from benchmarks.faults.subjects import CANARY, SUBJECTS, miniature_once
from codebook.errors import CodebookError

SECONDS, MESSAGE = 10, 600
CHUNK = 250
"""Cases of one process, whose peak memory is then known."""


@dataclass(frozen=True)
class Result:
    case: int
    subject: str
    what: str
    verdict: str
    seconds: float
    detail: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="CASE")
    parser.add_argument("--only", choices=SUBJECTS, help="one kind of file")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, miniature_once():
        examples = make_examples(Path(name), [options.only] if options.only else list(SUBJECTS))
        cases = range(options.first, options.first + options.cases)
        results, memory = in_processes(examples, cases, options.workers, Path(name))
    count = Counter(result.verdict for result in results)
    slowest = max(results, key=lambda result: result.seconds)
    for result in results:
        if result.verdict not in ("accepted", "refused"):
            print(f"case {result.case}, {result.subject}, {result.what}: {result.verdict}\n{result.detail}")
    print(f"{len(results)} cases of {len(examples)} kinds of files in {time.perf_counter() - start:.0f} s: "
          f"{count['refused']} refused, {count['accepted']} accepted, {count['traceback']} tracebacks, "
          f"{count['executed']} executions, {count['message']} messages too long or odd, {count['slow']} too slow, "
          f"{count['died']} processes died")  # fmt: skip
    print(f"slowest: {slowest.seconds:.2f} s, case {slowest.case} ({slowest.subject}, {slowest.what}); peak memory: "
          f"{memory / 2**20:.0f} MiB")  # fmt: skip
    sys.exit(any(verdict not in ("accepted", "refused") for verdict in count))


def make_examples(folder: Path, names: list[str]) -> dict[str, Path]:
    """A good example of each subject, which must be taken as it is."""
    examples = {name: folder / "examples" / name for name in names}
    for name, example in examples.items():
        example.mkdir(parents=True)
        with quiet() as said:
            try:
                SUBJECTS[name].make(example)
                SUBJECTS[name].read(Path(shutil.copytree(example, folder / "good" / name)))
            except BaseException as error:
                raise RuntimeError(f"the good example of {name} is not taken: {said.getvalue()}") from error
    return examples


def in_processes(examples: dict[str, Path], cases: range, workers: int, folder: Path) -> tuple[list[Result], int]:
    """All results, and the largest peak memory of a process, in bytes. A process that dies costs one case."""
    context, waiting = multiprocessing.get_context("fork"), [cases[i : i + CHUNK] for i in range(0, len(cases), CHUNK)]
    running: dict[Connection, tuple[Any, range, list[Result]]] = {}
    results: list[Result] = []
    memory = 0
    while waiting or running:
        while waiting and len(running) < workers:
            chunk = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_chunk, args=(theirs, examples, chunk, folder / str(chunk.start)))
            process.start()
            theirs.close()
            running[ours] = process, chunk, []
        for pipe in wait(list(running)):
            process, chunk, done = running[pipe]
            try:
                received = pipe.recv()
            except EOFError:
                process.join()
                del running[pipe]
                if len(done) < len(chunk):
                    done.append(Result(chunk[len(done)], "?", "?", "died", 0.0, f"exit code {process.exitcode}"))
                    if rest := chunk[len(done) :]:
                        waiting.append(rest)
                results += done
            else:
                if isinstance(received, Result):
                    done.append(received)
                else:
                    memory = max(memory, received)
    return sorted(results, key=lambda result: result.case), memory


def _chunk(pipe: Connection, examples: dict[str, Path], cases: range, folder: Path) -> None:
    folder.mkdir()
    for number in cases:
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # where no signal reaches Python
        pipe.send(case(number, examples, folder))
        faulthandler.cancel_dump_traceback_later()
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    shutil.rmtree(folder, ignore_errors=True)


def case(number: int, examples: dict[str, Path], folder: Path) -> Result:
    """Spoil and read; whatever is in the files, this returns."""
    draw = random.Random(number)
    names = list(examples)
    [name] = draw.choices(names, [SUBJECTS[name].weight for name in names])
    subject, copy, canary = SUBJECTS[name], folder / "copy", folder / "canary"
    os.environ[CANARY] = str(canary)
    shutil.copytree(examples[name], copy, symlinks=True)
    path = draw.choice([path for path in sorted(copy.glob(subject.files)) if path.is_file()])
    what = f"{spoil(path, draw, canary)} {path.relative_to(copy)}"
    if subject.sealed and draw.random() < 0.5:
        _seal(copy / subject.sealed)
    start = time.perf_counter()
    verdict, detail = _verdict(partial(subject.read, copy))
    seconds = time.perf_counter() - start
    if seconds > SECONDS:  # also where the alarm was taken for an error of the file
        verdict = "slow"
    if canary.exists():
        verdict = "executed"
        canary.unlink()
    shutil.rmtree(copy)
    return Result(number, name, what, verdict, seconds, detail)


def _verdict(read: Callable[[], object]) -> tuple[str, str]:
    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with quiet() as said:
            read()
        return "accepted", ""
    except TimeoutError:
        return "slow", traceback.format_exc(limit=-8)
    except CodebookError as error:
        message = str(error)
    except SystemExit as end:
        lines = said.getvalue().splitlines()
        if end.code != 2 or not lines or not lines[-1].startswith("error: "):
            return "traceback", f"exit code {end.code}: {said.getvalue()[-2000:]}"
        message = lines[-1]
    except BaseException:
        return "traceback", traceback.format_exc(limit=-8)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    good = len(message) <= MESSAGE and message.isprintable()
    return ("refused", message) if good else ("message", repr(message[: 2 * MESSAGE]))


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What is printed is kept instead; whoever is asked answers with yes."""
    said, stdin = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO("y\n" * 20)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            yield said
    finally:
        sys.stdin = stdin


def _seal(folder: Path) -> None:
    """Write the checksums of a codebook's files as they are now, where its config still has checksums."""
    import hashlib

    if not (folder / "config.json").is_file() or (folder / "config.json").stat().st_size > 2**20:
        return
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        config = json.loads((folder / "config.json").read_text())
        for name in config["sha256"]:
            path = folder / name
            if path.is_file() and path.stat().st_size < 2**20:
                config["sha256"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
