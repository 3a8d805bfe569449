"""A few of the cases of `benchmarks/faults`, which has the long run; and that it finds what it looks for."""

import json
import pickle
import sys

import pytest

from benchmarks.faults import mutate
from benchmarks.faults.subjects import SUBJECTS, Subject, miniature_once
from codebook.errors import CodebookError

CASES = 300


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    with miniature_once():
        yield mutate.make_examples(tmp_path_factory.mktemp("faults"), list(SUBJECTS))


def test_spoiled_files_are_taken_or_refused_in_one_line(examples, tmp_path):
    results = [mutate.case(number, examples, tmp_path) for number in range(CASES)]
    assert not [result for result in results if result.verdict not in ("accepted", "refused")]
    assert {result.subject for result in results} == set(SUBJECTS)
    assert all(sum(result.verdict == verdict for result in results) > CASES // 5 for verdict in ("accepted", "refused"))


def data(folder):
    path = folder / "a.json"
    if not path.is_file() or path.stat().st_size > 10**6:
        raise CodebookError("no small file")
    return path.read_bytes()


def unpickled(folder):
    try:
        pickle.loads(data(folder))
    except Exception:
        raise CodebookError("refused, but too late") from None


def parsed(folder):
    return {"a": 1}[json.loads(data(folder))["a"]]


def wordy(folder):
    try:
        parsed(folder)
    except Exception as error:
        print("error: " + 100 * f"{error} ", file=sys.stderr)
        raise SystemExit(2) from None


@pytest.mark.parametrize(("read", "verdict"), [(unpickled, "executed"), (parsed, "traceback"), (wordy, "message")])
def test_what_the_suite_looks_for_is_found(tmp_path, monkeypatch, read, verdict):
    def make(folder):
        (folder / "a.json").write_text('{"a": "a", "b": [1, 2]}')

    monkeypatch.setattr(mutate, "SUBJECTS", {"own": Subject(make, "*.json", read, 1)})
    (tmp_path / "own").mkdir()
    make(tmp_path / "own")
    found = [mutate.case(number, {"own": tmp_path / "own"}, tmp_path).verdict for number in range(100)]
    assert verdict in found
