"""Journals that are whole, but whose records are not what was written: one error, and never a wrong result."""

import json
import sqlite3
from contextlib import closing

import pytest
from pydantic import TypeAdapter

from codebook import Random, Schedule, Stage, models
from codebook.analysis import calibrate, sweep
from codebook.errors import CodebookError
from codebook.evaluation import bench, costs
from codebook.evaluation.looks import show_rows
from codebook.evaluation.metrics import ACCURACY, Task
from codebook.evaluation.rows import Row
from codebook.inference.records import read_record
from codebook.inference.respond import respond
from codebook.inference.samples import Sample
from codebook.miniature.samples import of_miniature
from codebook.store.database import entry_of
from codebook.store.journal import Journal

WRONG = [None, 3, "text", [], {}, [1, 2], [["a", "b"]], [["a", [1]]] * 3, {"full": 1}, float("nan"), [[{}]], -1]


@pytest.fixture(scope="module")
def loaded():
    return models.load("miniature", "cpu")


def spoil(file):
    """Each record of a journal in turn with each of the wrong values, and with the checksum of that."""
    with closing(sqlite3.connect(file)) as database:
        rows = database.execute("SELECT key, value FROM records").fetchall()
    assert len(rows) > 1
    for key, stored in rows:
        if (name := json.loads(key)) is not None:  # the null row is what they depend on
            for wrong in WRONG:
                put(file, key, json.dumps(entry_of(name, wrong)))
                yield
            put(file, key, stored)


def put(file, key, value):
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE records SET value = ? WHERE key = ?", (value, key))


def refused(run, file):
    whole = run()
    for _ in spoil(file):
        with pytest.raises(CodebookError, match=f"{file.name} is damaged: delete it"):
            run()
    assert run() == whole


def test_answers(loaded, tmp_path):
    samples, file = of_miniature("test", 0, 2, ["exist"]), tmp_path / "answers.sqlite"
    refused(lambda: respond(*loaded, samples, {"": lambda asked: None}, file), file)


@pytest.mark.parametrize("metric", ["probability", "generated"])
def test_sweeps(loaded, tmp_path, metric):
    samples, file = of_miniature("test", 0, 2, ["exist"]), tmp_path / "sweep.sqlite"
    refused(lambda: sweep(*loaded, samples, metric, file)[0].pruned.tolist(), file)


def test_calibration(loaded, tmp_path):
    """Two schedules of one kind; half of the samples without an answer."""
    asked = of_miniature("test", 0, 18, ["exist"])
    samples = [Sample(s.images, s.question, s.answer if i % 2 else None) for i, s in enumerate(asked)]
    plain, other = Schedule([Stage(0, 9, Random())]), Schedule([Stage(0, 140, Random())])
    file = tmp_path / "search.sqlite"
    refused(lambda: str(calibrate(*loaded, samples, plain, [other], file=file)), file)


def test_times_and_looks(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "ROUNDS", (2, 2))
    samples = of_miniature("test", 0, 1, ["exist"])
    tasks, rows = [Task("exist", samples, ACCURACY)], [Row("unpruned", 1.0, (None,))]
    run = lambda: bench.measure(*loaded, tasks, rows, tmp_path)["rows"]  # noqa: E731
    run()
    [file] = tmp_path.glob("timing-*.sqlite")
    refused(run, file)
    file = tmp_path / "samples.sqlite"
    refused(lambda: show_rows(*loaded, samples, rows, file), file)


def test_a_record_that_is_missing(tmp_path):
    with pytest.raises(CodebookError, match="damaged"):
        read_record(Journal(None, {}), "seconds", TypeAdapter(int))
