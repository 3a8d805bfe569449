"""The journal: whole records whatever happens, one writer, readers while it grows."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch

from codebook.errors import CodebookError
from codebook.store.journal import Journal

ABOUT = {"model": "m", "settings": {"a": 1, "b": 2}}


def test_records_and_tensors_come_back(tmp_path):
    file = tmp_path / "new" / "run.jsonl"
    with Journal(file, ABOUT) as journal:
        journal.add("one", {"x": [1, None, "ü\u2028"]})
        journal.add("two", 2, torch.arange(6.0).reshape(2, 3).T)
        journal.add("one", 3)
    with Journal(file, ABOUT) as journal:
        assert journal.records == {"one": 3, "two": 2} and "one" in journal and journal["two"] == 2
        assert torch.equal(journal.tensor("two"), torch.arange(6.0).reshape(2, 3).T)
        journal.remove()
    assert not file.exists() and not list(file.parent.iterdir())


def test_without_a_file_it_only_remembers():
    with Journal(None, ABOUT) as journal:
        journal.add("one", 1)
        assert journal["one"] == 1


def test_without_a_record_it_leaves_no_file(tmp_path):
    with Journal(tmp_path / "run.jsonl", ABOUT):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("about", "what"),
    [
        ({**ABOUT, "model": "n"}, "another model"),
        ({**ABOUT, "settings": {"a": 1, "b": 3}}, "another b"),
        ({"model": "m"}, "another purpose"),
    ],
)
def test_about_something_else(tmp_path, about, what):
    with Journal(tmp_path / "run.jsonl", ABOUT) as journal:
        journal.add("one", 1)
    with pytest.raises(CodebookError, match=rf"run\.jsonl is from a run with {what}: choose another --out, or delete"):
        Journal(tmp_path / "run.jsonl", about, output="--out")


def test_one_writer_and_any_reader(tmp_path):
    file, parts = tmp_path / "run.jsonl", tmp_path / "run-1-of-2.jsonl"
    with Journal(parts, ABOUT) as growing:
        growing.add("one", 1)
        with pytest.raises(CodebookError, match="another run is writing"):
            Journal(parts, ABOUT)
        with Journal(file, ABOUT, [parts]) as journal:
            assert journal["one"] == 1 and not file.stat().st_size
            journal.add("two", 2)
        growing.add("three", 3)
        assert Journal(None, ABOUT, [parts, file]).records == {"one": 1, "three": 3, "two": 2}


def test_every_cut_loses_at_most_the_last_record(tmp_path):
    """As a kill can leave it: the file ends after any of its bytes."""
    file = tmp_path / "run.jsonl"
    with Journal(file, ABOUT) as journal:
        for i in range(3):
            journal.add(str(i), i)
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with Journal(file, ABOUT) as journal:
            assert len(journal.records) == max(0, sum(end <= size for end in ends) - 1)
            journal.add("more", "x")
        with Journal(file, ABOUT) as journal:
            assert journal["more"] == "x"


@pytest.mark.parametrize(
    "data", [b"not a journal", b"not a journal\n", b"\xff\xfe\n", b"{}\n", b'{"about": 3}\n', b"[]\n"]
)
def test_another_file_is_left_alone(tmp_path, data):
    file = tmp_path / "run.jsonl"
    file.write_bytes(data)
    with pytest.raises(CodebookError, match=r"run\.jsonl is (no journal|from a run with another)"):
        Journal(file, ABOUT)
    with pytest.raises(CodebookError, match=r"run\.jsonl is (no journal|from a run with another)"):
        Journal(None, ABOUT, [file])
    assert file.read_bytes() == data


def test_damage_inside_is_an_error(tmp_path):
    file = tmp_path / "run.jsonl"
    with Journal(file, ABOUT) as journal:
        journal.add("one", 1)
        journal.add("two", 2, torch.zeros(3))
    [part] = (tmp_path / "run.parts").iterdir()
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    with Journal(file, ABOUT) as journal, pytest.raises(CodebookError, match="safetensors is damaged"):
        journal.tensor("two")
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0], b"{" + lines[1], *lines[2:]]))
    with pytest.raises(CodebookError, match="no journal, or damaged"):
        Journal(file, ABOUT)


def test_full_disk(tmp_path, monkeypatch):
    """A file size limit stands in for a full disk: the system refuses the bytes at the same place."""
    file, old = tmp_path / "run.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(file, ABOUT) as journal:
        journal.add("one", 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, old[1]))
        try:
            for value, tensor in (("x" * 100, None), ("x", torch.zeros(1000))):
                with pytest.raises(CodebookError, match=r"cannot write .*what is finished is kept: free space"):
                    journal.add("two", value, tensor)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        journal.add("three", 3)
    with Journal(file, ABOUT) as journal:
        assert journal.records == {"one": 1, "three": 3}

        def lost(handle):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(os, "fsync", lost)
        with pytest.raises(
            CodebookError, match="Read-only file system; what is finished is kept: nothing can be written there"
        ):
            journal.add("four", 4)


def _add_for_ever(file, told):
    with Journal(file, {}) as journal:
        told(len(journal.records))
        for i in range(len(journal.records), 10**9):
            journal.add(str(i), i, torch.full((50,), float(i)))
            told(i)


def test_kills(tmp_path):
    """kill -9 at random moments: every record that was acknowledged is there, with its tensor."""
    processes, file, acknowledged = multiprocessing.get_context("spawn"), tmp_path / "run.jsonl", -1
    for delay in (0.0, 0.05, 0.1, 0.3):
        here, there = processes.Pipe(duplex=False)
        process = processes.Process(target=_add_for_ever, args=(file, there.send))
        process.start()
        assert here.recv() > acknowledged
        time.sleep(delay)
        process.kill()
        process.join()
        there.close()
        assert process.exitcode == -signal.SIGKILL
        try:
            while True:
                acknowledged = max(acknowledged, here.recv())
        except EOFError:
            pass
        with Journal(file, {}) as journal:
            assert list(journal.records.values()) == list(range(len(journal.records)))
            assert len(journal.records) > acknowledged
            assert all(journal.tensor(name)[0] == int(name) for name in journal.records)
    assert all(json.loads(line) for line in file.read_text().splitlines()) and acknowledged > 2
