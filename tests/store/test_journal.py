"""The journal: whole records whatever happens, one writer, readers while it grows, nothing believed unchecked."""

import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy
import pytest
import torch

from codebook import __version__
from codebook.errors import CodebookError
from codebook.store.journal import Journal

ABOUT = {"model": "m", "settings": {"a": 1, "b": 2}}
DAMAGED = r"is no journal, or damaged: choose another file, or delete it"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.sqlite"


def written(file, count=3, about=ABOUT):
    """A closed journal of some records."""
    with Journal(file, about) as journal:
        for i in range(count):
            journal.add(str(i), i)
    return file


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def as_killed(file, to):
    """What a kill would leave of a journal that is open now, under another name."""
    for path in file.parent.glob(f"{file.name}*"):
        shutil.copy(path, to.with_name(path.name.replace(file.name, to.name)))
    return to


def edit(file, statement, *values):
    with closing(sqlite3.connect(file)) as database, database:
        database.execute(statement, values)


def test_records_and_tensors_come_back(tmp_path):
    file = tmp_path / "new" / "run.sqlite"
    with Journal(file, ABOUT) as journal:
        journal.add("one", {"x": [1, None, "ü\u2028"]})
        journal.add("two", 2, torch.arange(6.0).reshape(2, 3).T)
        journal.add("one", 3)
        journal.add("\udcff", 4)  # of a file's name that is not UTF-8
        journal.add("", 5, torch.ones(1))
    with Journal(file, ABOUT) as journal:
        assert journal.records == {"one": 3, "two": 2, "\udcff": 4, "": 5} and "one" in journal and journal["two"] == 2
        assert torch.equal(journal.tensor("two"), torch.arange(6.0).reshape(2, 3).T)
        assert torch.equal(journal.tensor(""), torch.ones(1))
        journal.remove()
        assert not listing(file.parent)
    assert not listing(file.parent)


def test_records_are_json_in_a_database_in_write_ahead_mode(file):
    written(file, 1)
    assert listing(file.parent) == ["run.sqlite"] and file.read_bytes()[18:20] == b"\2\2"
    with closing(sqlite3.connect(file)) as database:
        rows = dict(database.execute("SELECT key, value FROM records"))
    assert [json.loads(key) for key in rows] == [None, "0"]
    assert [json.loads(text)["value"] for text in rows.values()] == [ABOUT | {"version": __version__}, 0]


def test_without_a_file_it_only_remembers():
    with Journal(None, ABOUT) as journal:
        journal.add("one", 1)
        assert journal["one"] == 1


def test_without_a_record_it_leaves_no_file(file):
    for _ in range(2):
        with Journal(file, ABOUT):
            assert "run.sqlite-lock" in listing(file.parent)
        assert not listing(file.parent)
        file.touch()  # killed while it was made


def test_without_a_record_it_leaves_no_folder_that_it_made(file):
    (file.parent / "mine").mkdir()
    with Journal(file.parent / "new" / "er" / file.name, ABOUT), Journal(file.parent / "mine" / file.name, ABOUT):
        assert listing(file.parent) == ["mine", "new"]
    assert listing(file.parent) == ["mine"]
    with Journal(file.parent / "new" / "er" / file.name, ABOUT):
        (file.parent / "new" / "other").touch()
    assert listing(file.parent / "new") == ["other"]


@pytest.mark.parametrize(
    ("about", "what"),
    [
        ({**ABOUT, "model": "n"}, "another model"),
        ({**ABOUT, "settings": {"a": 1, "b": 3}}, "another b"),
        ({"model": "m"}, "another purpose"),
    ],
)
def test_about_something_else(file, about, what):
    data = written(file).read_bytes()
    with pytest.raises(CodebookError, match=rf"run\.sqlite is from a run with {what}: choose another --out, or delete"):
        Journal(file, about, output="--out")
    assert file.read_bytes() == data and listing(file.parent) == ["run.sqlite"]
    with pytest.raises(CodebookError, match=rf"run\.sqlite is from a run with {what}"):
        Journal(None, about, [file])


def test_another_version_is_another_run(file, monkeypatch):
    """Its methods may choose other tokens: answers of both in one table would be compared as if they were of one."""
    monkeypatch.setattr("codebook.store.journal.__version__", "0.1.0")
    written(file)
    monkeypatch.undo()
    with pytest.raises(CodebookError, match=r"run\.sqlite is from a run with another version: choose another file, or"):
        Journal(file, ABOUT)


def test_one_writer_and_any_reader(tmp_path):
    file, part = tmp_path / "run.sqlite", tmp_path / "run-1-of-2.sqlite"
    with Journal(part, ABOUT) as growing:
        growing.add("one", 1)
        with pytest.raises(CodebookError, match=r"another run is writing .*: wait for it, or choose another output"):
            Journal(part, ABOUT)
        with Journal(file, ABOUT, [part]) as journal:
            assert journal["one"] == 1 and not file.exists()
            journal.add("two", 2)
        growing.add("three", 3)
        before = listing(tmp_path)
        assert Journal(None, ABOUT, [part, file]).records == {"one": 1, "three": 3, "two": 2}
        assert listing(tmp_path) == before
    with Journal(part, ABOUT) as growing:
        assert growing.records == {"one": 1, "three": 3}


def test_a_part_that_is_closed_meanwhile_without_a_record(tmp_path):
    assert Journal(None, ABOUT, [tmp_path / "run-1-of-2.sqlite"]).records == {}


def test_reading_needs_no_place_beside_and_leaves_none(tmp_path):
    """Neither a closed journal nor one whose writer was killed, also where nothing can be written."""
    written(tmp_path / "a.sqlite")
    with Journal(tmp_path / "open.sqlite", ABOUT) as journal:
        journal.add("x", 1)
        as_killed(tmp_path / "open.sqlite", tmp_path / "b.sqlite")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    tmp_path.chmod(0o555)
    try:
        assert Journal(None, ABOUT, [tmp_path / "a.sqlite", tmp_path / "b.sqlite"]).records.keys() == {*"012", "x"}
    finally:
        tmp_path.chmod(0o755)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_readers_see_whole_records_while_a_writer_hurries(file):
    """Until the log was put into the database and began anew several times: every prefix, never less than before."""
    stop = threading.Event()

    def write():
        with Journal(file, ABOUT) as journal:
            for i in range(10**6):
                if stop.is_set():
                    return
                journal.add(str(i), "x" * 2000)

    writer = threading.Thread(target=write)
    writer.start()
    seen, headers, last = 0, set(), time.monotonic() + 60
    try:
        while len(headers) < 3 and time.monotonic() < last:
            names = list(Journal(None, ABOUT, [file]).records)
            assert names == [str(i) for i in range(len(names))] and len(names) >= seen
            seen = len(names)
            log = file.with_name("run.sqlite-wal")
            if log.exists() and (header := log.read_bytes()[:32]):  # empty before its first record
                headers.add(header)
    finally:
        stop.set()
        writer.join()
    assert len(headers) >= 3 and seen


def test_a_log_that_begins_anew_while_it_is_read(file, monkeypatch):
    """Between the copies of the database and of its log: that log says nothing about that database."""
    copy, hurried = shutil.copyfile, []

    def slowly(source, to):
        copy(source, to)
        if source == file and not hurried:
            hurried.extend(str(i) for i in range(700))
            for name in hurried:
                journal.add(name, "x" * 5000)

    with Journal(file, ABOUT) as journal:
        journal.add("first", 1)
        monkeypatch.setattr(shutil, "copyfile", slowly)
        assert list(Journal(None, ABOUT, [file]).records) == ["first", *hurried]


def test_every_cut_of_the_log_loses_at_most_the_last_records(tmp_path):
    """As a kill or a power cut can leave it: the log ends after any of its bytes, here some hundred places."""
    killed, counts = tmp_path / "killed.sqlite", []
    with Journal(tmp_path / "run.sqlite", ABOUT) as journal:
        for i in range(3):
            journal.add(str(i), i)
        log = (tmp_path / "run.sqlite-wal").read_bytes()
        for size in sorted({*range(0, len(log) + 1, 211), *range(0, len(log) + 1, 4096 + 24), len(log)}):
            as_killed(tmp_path / "run.sqlite", killed)
            (tmp_path / "killed.sqlite-wal").write_bytes(log[:size])
            there = Journal(None, ABOUT, [killed]).records
            with Journal(killed, ABOUT) as again:
                assert again.records == there == {str(i): i for i in range(len(there))}
                counts.append(len(there))
                again.add("more", "x")
            with Journal(killed, ABOUT) as again:
                assert again["more"] == "x"
                again.remove()
    assert counts == sorted(counts) and set(counts) == {0, 1, 2, 3}


def test_a_log_without_its_database_is_not_believed(file):
    with Journal(file, ABOUT) as journal:
        journal.add("one", 1)
        log = file.with_name("run.sqlite-wal").read_bytes()
    file.unlink()
    file.with_name("run.sqlite-wal").write_bytes(log)
    with Journal(file, ABOUT) as journal:
        assert not journal.records
        journal.add("two", 2)
    with Journal(file, ABOUT) as journal:
        assert journal.records == {"two": 2}


@pytest.mark.parametrize(
    "data",
    [b"not a journal", b"\xff\xfe\n", b"{}\n", b"\0" * 5000, b"SQLite format 3\0", b"SQLite format 3\0" * 1000],
)
def test_another_file_is_left_alone(file, data):
    file.write_bytes(data)
    with pytest.raises(CodebookError, match=rf"run\.sqlite {DAMAGED}"):
        Journal(file, ABOUT)
    with pytest.raises(CodebookError, match=rf"run\.sqlite {DAMAGED}"):
        Journal(None, ABOUT, [file])
    assert file.read_bytes() == data and listing(file.parent) == ["run.sqlite"]


@pytest.mark.parametrize(
    "schema",
    [
        "CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)",  # sqlitedict's own
        "CREATE TABLE records (key TEXT PRIMARY KEY, value BLOB)",
        "CREATE VIEW records AS SELECT 'null' AS key, '{}' AS value",
        'CREATE TABLE "records" (key TEXT PRIMARY KEY, value BLOB, more BLOB AS (zeroblob(1000000000)))',
        'CREATE TABLE "records" (key TEXT PRIMARY KEY, value BLOB); CREATE TABLE more (x)',
        'CREATE TABLE "records" (key TEXT PRIMARY KEY, value BLOB);'
        "CREATE TRIGGER more AFTER INSERT ON records BEGIN DELETE FROM records; END",
    ],
)
def test_a_database_of_something_else_is_left_alone(file, schema):
    with closing(sqlite3.connect(file)) as database:
        database.executescript(schema)
    data = file.read_bytes()
    for arguments in ((file, ABOUT), (None, ABOUT, [file])):
        with pytest.raises(CodebookError, match=DAMAGED):
            Journal(*arguments)
    assert file.read_bytes() == data and listing(file.parent) == ["run.sqlite"]


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    "value",
    [
        pickle.dumps(Bomb()), pickle.dumps({"value": 1}), b'{"value": 1}', b"\xff", None, 3, 0.5, "", "x", "3", "[]",
        "null", '"x"', "{}", '{"value": 1}', '{"value": 1, "tensor": null}',
        '{"value": 1, "tensor": null, "sha256": "0"}', "[" * 100_000, "9" * 10_000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["null", '"1"'])
def test_a_value_that_no_journal_wrote(file, key, value, tmp_path, monkeypatch):
    """Of the wrong type, damaged, or a pickle, which is never loaded."""
    monkeypatch.chdir(tmp_path)
    edit(written(file), "UPDATE records SET value = ? WHERE key = ?", value, key)
    for arguments in ((file, ABOUT), (None, ABOUT, [file])):
        with pytest.raises(CodebookError, match=rf"run\.sqlite {DAMAGED}") as found:
            Journal(*arguments)
        assert "\n" not in str(found.value)
    assert not Path("executed").exists() and file.exists()


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("DELETE FROM records WHERE key = ?", "null"),
        *[("UPDATE records SET key = ? WHERE key = '\"1\"'", key) for key in ("x", "[]", "3", b"\xff", None, '"7"')],
    ],
)
def test_a_name_that_no_journal_wrote(file, statement, value):
    edit(written(file), statement, value)
    with pytest.raises(CodebookError, match=DAMAGED):
        Journal(file, ABOUT)


def test_mutated_databases(tmp_path):
    """Bytes changed, cut or repeated: the records as they were, or a line that says what is wrong."""
    whole, file = written(tmp_path / "whole.sqlite", 40).read_bytes(), tmp_path / "m.sqlite"
    random, refused = numpy.random.default_rng(0), 0
    for i in range(400):
        data = bytearray(whole)
        for place in random.integers(0, len(data), random.integers(1, 9)):
            data[place] = random.integers(256)
        if i % 4 == 0:
            data = data[: random.integers(len(data))]
        if i % 4 == 1:
            place = int(random.integers(len(data)))
            data[place:place] = data[: int(random.integers(len(data)))]
        file.write_bytes(data)
        for arguments in ((None, ABOUT, [file]), (file, ABOUT)):
            try:
                with Journal(*arguments) as journal:
                    found = journal.records
                    if arguments[0] and found:
                        journal.add("more", 1)
            except CodebookError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
                refused += 1
            else:
                assert found in ({}, {str(i): i for i in range(40)}, {str(i): i for i in range(40)} | {"more": 1})
        for path in tmp_path.glob("m.sqlite*"):
            path.unlink()
    assert 200 < refused < 800


def test_a_damaged_tensor(file):
    with Journal(file, ABOUT) as journal:
        journal.add("two", 2, torch.zeros(3))
    [part] = file.with_suffix(".parts").iterdir()
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    with Journal(file, ABOUT) as journal:
        with pytest.raises(CodebookError, match="safetensors is damaged"):
            journal.tensor("two")
        with part.open("wb") as sparse:
            sparse.truncate(2**40)  # not read
        with pytest.raises(CodebookError, match="at most"):
            journal.tensor("two")
        part.unlink()
        os.mkfifo(part)
        with pytest.raises(CodebookError, match="not a regular file"):
            journal.tensor("two")


@pytest.mark.parametrize("ending", ["", "-wal", "-shm", "-journal", "-lock"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder"])
def test_nothing_is_written_through_a_link_or_into_what_is_no_file(tmp_path, file, ending, kind):
    path, victim = file.with_name(file.name + ending), tmp_path / "victim"
    if ending:
        written(file)
    if kind == "link":
        victim.write_bytes(b"precious")
    if kind in ("link", "dangling"):
        path.symlink_to(victim)
    else:
        os.mkfifo(path) if kind == "fifo" else path.mkdir()
    for arguments in ((file, ABOUT), (None, ABOUT, [file])):
        with pytest.raises(CodebookError, match=f"run.sqlite{ending} is there and no regular file: choose another"):
            Journal(*arguments)
    assert (victim.read_bytes() == b"precious") if kind == "link" else not victim.exists()


def test_a_link_that_comes_too_late_to_be_seen(tmp_path, file, monkeypatch):
    """The lock's own opening does not follow it, nor does SQLite's of its files."""
    monkeypatch.setattr("codebook.store.journal.check_regular", lambda *_: None)
    (tmp_path / "victim").write_bytes(b"precious")
    for ending in ("-lock", "-wal", "-shm"):
        written(file)
        link = file.with_name(file.name + ending)
        link.symlink_to(tmp_path / "victim")
        with pytest.raises(CodebookError), Journal(file, ABOUT) as journal:
            journal.add("one", 1)
        link.unlink(missing_ok=True)
        assert (tmp_path / "victim").read_bytes() == b"precious"


def test_a_journal_of_an_earlier_version(file):
    """JSON lines: refused by name, and left alone."""
    earlier = file.with_suffix(".jsonl")
    earlier.write_text('{"about": {"model": "m"}}\n{"name": "one", "value": 1}\n')
    for arguments in ((file, ABOUT), (earlier, ABOUT), (None, ABOUT, [earlier])):
        with pytest.raises(CodebookError, match=r"run\.jsonl is a journal of an earlier version: choose another file"):
            Journal(*arguments)
    assert listing(file.parent) == ["run.jsonl"]
    earlier.write_text('{"image": "a.png"}\n')  # the user's own
    written(file)


def test_full_disk(file):
    """A file size limit stands in for a full disk: the system refuses the bytes at the same place."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(file, ABOUT) as journal:
        journal.add("one", 1)
        log = file.with_name("run.sqlite-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (log + 10, old[1]))
        try:
            for value, tensor in (("x" * 10_000, None), ("x", torch.zeros(log))) * 2:
                with pytest.raises(CodebookError, match=r"cannot write .*what is finished is kept: free space"):
                    journal.add("two", value, tensor)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        journal.add("three", 3)
    with Journal(file, ABOUT) as journal:
        assert journal.records == {"one": 1, "three": 3}


def test_a_full_disk_is_not_taken_for_damage(tmp_path):
    """After a kill SQLite has to write before it can read."""
    old, file = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "killed.sqlite"
    with Journal(tmp_path / "run.sqlite", ABOUT) as journal:
        journal.add("one", 1)
        as_killed(tmp_path / "run.sqlite", file)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, old[1]))
    try:
        with pytest.raises(CodebookError, match=r"cannot write .*free space"):
            Journal(file, ABOUT)
        with pytest.raises(CodebookError, match=r"cannot read .*File too large; free space"):
            Journal(None, ABOUT, [file])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert Journal(None, ABOUT, [file]).records == {"one": 1}
    with Journal(file, ABOUT) as journal:
        assert journal.records == {"one": 1}


def test_a_disk_that_is_full_from_the_start(file):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, old[1]))
    try:
        with pytest.raises(CodebookError, match="free space"), Journal(file, ABOUT) as journal:
            journal.add("one", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not listing(file.parent)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EROFS, "nothing can be written there"),
        (errno.EACCES, "change its permissions"),
        (errno.ENOLCK, "this file system has no file locks"),
    ],
)
def test_other_reasons_do_not_speak_of_space(file, code, remedy, monkeypatch):
    text = os.strerror(code)

    def fail(*_):
        raise OSError(code, text)

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(CodebookError, match=rf"cannot write .*run\.sqlite: {text}; .*{remedy}"):
        Journal(file, ABOUT)
    monkeypatch.undo()
    with Journal(file, ABOUT) as journal:
        journal.add("one", 1)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(CodebookError, match=f"{text}; what is finished is kept: .*{remedy}"):
            journal.add("two", 2, torch.zeros(3))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_database_that_cannot_be_written(file):
    written(file).chmod(0o444)
    with pytest.raises(CodebookError, match=r"cannot write .*readonly database; .*permissions"):
        Journal(file, ABOUT)


def _add_for_ever(file, told):
    with Journal(file, {}) as journal:
        told(len(journal.records))
        for i in range(len(journal.records), 10**9):
            journal.add(str(i), i, torch.full((50,), float(i)))
            told(i)


def test_kills(file):
    """kill -9 at random moments: every record that was acknowledged is there, with its tensor."""
    processes, acknowledged = multiprocessing.get_context("spawn"), -1
    for delay in (0.0, 0.05, 0.1, 0.3):
        here, there = processes.Pipe(duplex=False)
        process = processes.Process(target=_add_for_ever, args=(file, there.send))
        process.start()
        assert here.recv() > acknowledged
        if delay:  # at 0 not even one may be; later one is waited for, however busy the machine is
            acknowledged = here.recv()
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
        seen = Journal(None, {}, [file]).records
        with Journal(file, {}) as journal:
            assert list(journal.records.values()) == list(range(len(journal.records)))
            assert len(seen) == len(journal.records) > acknowledged
            assert all(journal.tensor(name)[0] == int(name) for name in journal.records)
    assert acknowledged >= 2
