"""A codebook's folder while another process writes it, and after that was killed."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch

from codebook.errors import CodebookError
from codebook.store import folder
from codebook.store.codebook import Codebook
from codebook.store.locks import writing
from tests.store.books import make


def _save_for_ever(path, told):
    books = [make(seed=seed, n=40 + seed) for seed in range(3)]
    for i in range(10**9):
        books[i % 3].save(path)
        if i == 0:
            told(i)


@pytest.fixture
def writer():
    processes = multiprocessing.get_context("spawn")
    started = []

    def start(path):
        here, there = processes.Pipe(duplex=False)
        process = processes.Process(target=_save_for_ever, args=(path, there.send))
        process.start()
        assert here.recv() == 0
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_reader_beside_a_writer_gets_one_codebook_or_another(writer, tmp_path):
    books = [make(seed=seed, n=40 + seed) for seed in range(3)]
    process, seen, loads, until = writer(tmp_path), set(), 0, time.monotonic() + 60
    while (loads < 150 or len(seen) < 3) and time.monotonic() < until:  # the writer may get little time of a core
        loads += 1
        loaded = Codebook.load(tmp_path)
        which = len(loaded) - 40
        assert torch.equal(loaded.prototypes, books[which].prototypes) and loaded.provenance == books[which].provenance
        seen.add(which)
    assert process.is_alive() and len(seen) == 3


def test_two_writers_leave_one_codebook(writer, tmp_path):
    for process in (writer(tmp_path), writer(tmp_path)):
        time.sleep(0.2)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    make(seed=7).save(tmp_path)
    assert torch.equal(Codebook.load(tmp_path).prototypes, make(seed=7).prototypes)
    assert len(list(tmp_path.iterdir())) == 4, "what the kills left is gone"


def test_who_cannot_wait_is_told(tmp_path, monkeypatch):
    make().save(tmp_path)
    monkeypatch.setattr("codebook.store.folder.WRITER_PATIENCE", 0.05)
    with writing(tmp_path, patience=0), pytest.raises(CodebookError, match="another process is writing"):
        make().save(tmp_path)
    make(seed=1).save(tmp_path)


def test_torn_by_a_kill_it_is_damaged_and_not_mixed(tmp_path):
    """The moments between the renames of one save over another codebook."""
    make(seed=1).save(tmp_path / "new")
    names = ["prototypes.safetensors", "provenance.jsonl"]
    for i in range(1, len(names)):
        make(seed=0).save(tmp_path / "book")
        for name in names[:i]:
            (tmp_path / "new" / name).rename(tmp_path / "book" / name)
        with pytest.raises(CodebookError, match="is damaged"):
            Codebook.load(tmp_path / "book")


def test_a_reader_waits_for_the_last_file(tmp_path, monkeypatch):
    """Caught between the first file and the last, it takes the new codebook, whole, once that is there."""
    make(seed=0).save(tmp_path)
    make(seed=1).save(tmp_path / "new")
    (tmp_path / "new" / "prototypes.safetensors").rename(tmp_path / "prototypes.safetensors")
    asked = []

    def being_written(path):
        asked.append(path)
        if len(asked) == 3:
            for file in (tmp_path / "new").iterdir():
                file.rename(tmp_path / file.name)
        return True

    monkeypatch.setattr(folder, "being_written", being_written)
    assert torch.equal(Codebook.load(tmp_path).prototypes, make(seed=1).prototypes) and len(asked) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", 3), ("fingerprint", []), ("dimension", "16"), ("dimension", -1), ("prototypes", 2.5), ("sha256", []),
        ("sha256", {"prototypes.safetensors": 1}), ("settings", []), ("images", {"used": "x"}), ("images", {}),
        ("funnel", {"a": -1}), ("funnel", [1]), ("spread", "wide"), ("spread", float("nan")), ("grid", {}),
        ("grid", ["a", "b"]), ("format_version", "1"), ("format_version", True), ("format_version", None),
    ],
)  # fmt: skip
def test_wrong_types_in_the_config(tmp_path, key, value):
    make().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CodebookError, match=rf"cannot read .*config\.json: ({key}|NaN)"):
        Codebook.load(tmp_path)
    assert os.listdir(tmp_path)
