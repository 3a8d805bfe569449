"""What the rows of a benchmark cost: time and memory of one prompt, all rows side by side, kept in a journal."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, NonNegativeFloat, PositiveInt, TypeAdapter
from typing_extensions import TypedDict

from codebook import models
from codebook.evaluation.latency import TimedPrompt
from codebook.evaluation.rows import Row, schedule_key
from codebook.evaluation.timing import machine, quartiles
from codebook.inference.records import damaged, read_record
from codebook.models.base import attention_kernel
from codebook.pruning.tokens import digest_rows
from codebook.store.journal import Journal

ROUNDS = 3, 25
"""Fewest and most timing rounds."""


class Seconds(TypedDict):
    """Times of a row in the journal."""

    first_token: FiniteFloat
    decode: FiniteFloat
    vision: FiniteFloat
    selector: FiniteFloat
    prefill: FiniteFloat


class Bytes(TypedDict):
    """Memory of a row in the journal."""

    peak_memory: int
    kv_cache: int


class Timed(TypedDict):
    """What has been timed: so many rounds, in so many of the seconds of `measure_costs`."""

    rounds: PositiveInt
    seconds: NonNegativeFloat


TIMED, ROUND = TypeAdapter(Timed), TypeAdapter(dict[str, Seconds])
RATES, MEMORY = TypeAdapter(dict[str, list[FiniteFloat | None]]), TypeAdapter(Bytes)
"""Forms of the journal's records: how many rounds, a round by row, its answers per second by row and size of batch,
memory of a row."""


def measure_costs(
    bench: TimedPrompt,
    rows: Sequence[Row],
    out: Path,
    note: Callable[[str], None],
    *,
    seed: int,
    seconds: float,
    sizes: Sequence[int],
) -> list[dict[str, Any]]:
    """Time and memory of each row; the first one is what the others' speed-up is against.

    Parameters
    ----------
    out
        Folder of the journal: called again, no round in it is repeated; with more `seconds` others are added.
    note
        Called with what is measured now.
    seed
        Seed of the order of each round.
    seconds
        Seconds to spend on timing; at least three rounds are run.
    sizes
        Sizes of the batches whose answers per second are measured.
    """
    names = [f"{row.name} {schedule_key(row.schedules[0])}" for row in rows]
    device = bench.model.device.type
    about = {"model": models.identity(bench.model), "machine": machine(device), "rows": names, "seed": seed}
    about["attention"] = attention_kernel(bench.model)
    about["prompt"] = int(digest_rows(bench.inputs["input_ids"])[0])
    about |= {"batches": list(sizes)} if sizes else {}
    # Times of other rows, or of another machine, must not enter this comparison: each has a file of its own.
    code = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    with Journal(out / f"timing-{code}.sqlite", about) as journal:
        for i, (row, name) in enumerate(zip(rows, names, strict=True)):
            if f"memory {name}" not in journal:
                note(f"memory {i + 1}/{len(rows)}")
                journal.add(f"memory {name}", bench.memory(row.schedules[0]))
        spent = read_record(journal, "timed", TIMED)["seconds"] if "timed" in journal else -1.0
        if seconds > spent:
            batches, start = [bench.repeated(size) for size in sizes], time.monotonic() - max(0.0, spent)
            for number in range(ROUNDS[1]):
                if f"round {number}" not in journal:
                    note(f"timing, round {number + 1}")
                    _time_round(journal, number, bench, batches, dict(zip(names, rows, strict=True)), seed)
                if number + 1 >= ROUNDS[0] and time.monotonic() - start > seconds:
                    break
            journal.add("timed", {"rounds": number + 1, "seconds": seconds})
    return _read_costs(journal, names, sizes)


def _time_round(
    journal: Journal,
    number: int,
    bench: TimedPrompt,
    batches: Sequence[TimedPrompt],
    rows: Mapping[str, Row],
    seed: int,
) -> None:
    """Time all rows once, in an order drawn for this round."""
    order = list(rows)
    random.Random(f"{seed} {number}").shuffle(order)
    if batches and f"rates {number}" not in journal:
        rates = {name: [one.rate(rows[name].schedules[0]) for one in batches] for name in order}
        journal.add(f"rates {number}", rates)
    journal.add(f"round {number}", {name: bench.seconds(rows[name].schedules[0]) for name in order})


def _read_costs(journal: Journal, names: Sequence[str], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """What the journal says of each row; its first is the reference.

    Raises
    ------
    CodebookError
        If a record is missing or of another form.
    """
    done = range(read_record(journal, "timed", TIMED)["rounds"])
    rounds = [read_record(journal, f"round {i}", ROUND) for i in done]
    speeds = [read_record(journal, f"rates {i}", RATES) for i in done] if sizes else []
    if not all(set(names) <= measured.keys() for measured in rounds):
        raise damaged(journal)
    if any(len(own.get(name, ())) != len(sizes) for own in speeds for name in names):
        raise damaged(journal)
    return [
        _cost(rounds, name, names[0]) | read_record(journal, f"memory {name}", MEMORY)
        | {"throughput": _throughput([own[name] for own in speeds], sizes)}
        for name in names
    ]  # fmt: skip


def _throughput(rates: Sequence[Sequence[float | None]], sizes: Sequence[int]) -> dict[str, Any]:
    """Answers per second by size of batch, from those of each round; None where a batch did not fit into memory."""
    found: dict[str, Any] = {}
    for size, own in zip(sizes, zip(*rates, strict=True), strict=bool(rates)):
        measured = [rate for rate in own if rate is not None]
        found[str(size)] = quartiles(measured) if len(measured) == len(own) else None
    return found


def _cost(rounds: Sequence[Mapping[str, Any]], name: str, reference: str) -> dict[str, Any]:
    found: dict[str, Any] = {key: quartiles([one[name][key] for one in rounds]) for key in rounds[0][name]}
    # Ratios within a round: whatever slows the machine down for a while slows both.
    found["speedup"] = quartiles([one[reference]["first_token"] / one[name]["first_token"] for one in rounds])
    return found
