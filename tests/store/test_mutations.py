"""Every file of a codebook and of an unfinished build, changed at will: it loads, or one line says why not.

Half of the changes are to values in JSON, under checksums that are right again. `benchmarks/faults/mutate.py` has many
more cases, of every kind of file that the package reads.
"""

import contextlib
import json
import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from codebook.building import SurvivorPool, build, merge, read_settings
from codebook.building.records import IMAGES_JOURNAL, PROBED, pooled
from codebook.building.unfinished import open_journal
from codebook.errors import CodebookError
from codebook.store.codebook import Codebook
from codebook.store.database import entry_of, read_entries
from tests.building.tiny import model, processor, settings
from tests.store.books import reseal

VALUES = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "\u2028",
    "\ud800", "../../etc/passwd", "0" * 64, [], [[]], {}, {"a": 1}, [1, "a", None], "x" * 5000,
]  # fmt: skip
JSON_FILES = ("config.json", "provenance.jsonl", "images.jsonl")
JOURNAL = ".build/journal.sqlite"
FILES = (*JSON_FILES, JOURNAL, "prototypes.safetensors", "survivors.safetensors", "README.md")


def make_originals(folder):
    """A codebook with all its files, and an unfinished build."""
    import numpy as np
    from PIL import Image

    (folder / "in").mkdir()
    for i in range(5):
        coarse = np.random.default_rng(i % 4).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 24)).save(folder / "in" / f"{i}.png")
    options = {"model_id": "tiny", "settings": settings()}
    build(model(), processor(), folder / "in", folder / "book", **options)

    def stop(state):
        if state.done == 2:
            raise KeyboardInterrupt

    try:
        build(model(), processor(), folder / "in", folder / "unfinished", progress=stop, **options)
    except KeyboardInterrupt:
        shutil.move(folder / "unfinished" / ".build", folder / "book" / ".build")
    return folder / "book"


def mutate_bytes(data, rng):
    """A few bytes changed, cut, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.choice((1, 2, 50, 10**6))]
        elif kind == 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 200)]
        elif kind == 4 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        else:
            data[at:at] = rng.choice(
                (b"\n", b"\0", b"\xef\xbb\xbf", "\u2028".encode(), b"{", b"[" * 300, b'"', b"1e999")
            )
    return bytes(data)


def mutate_value(value, rng):
    """One place of some JSON with another value, or gone."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        places = list(value) if isinstance(value, dict) else range(len(value))
        place = rng.choice(list(places))
        if rng.random() < 0.15:
            copied = dict(value) if isinstance(value, dict) else list(value)
            del copied[place]
            return copied
        changed = mutate_value(value[place], rng)
        if isinstance(value, dict):
            return {**value, place: changed}
        return [*value[:place], changed, *value[place + 1 :]]
    return rng.choice(VALUES)


def mutate_json(data, rng, name):
    lines = [json.loads(line) for line in data.splitlines()] if name.endswith("l") else [json.loads(data)]
    at = rng.randrange(len(lines))
    lines[at] = mutate_value(lines[at], rng)
    if rng.random() < 0.1:
        rng.shuffle(lines)
    text = "".join(json.dumps(line, ensure_ascii=rng.random() < 0.5) + "\n" for line in lines)
    return text.encode("utf-8", "surrogatepass")


def mutate_records(path, rng):
    """One record of a journal with another value, under a digest that is right again."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        rows = dict(database.execute("SELECT key, value FROM records").fetchall())
        key = rng.choice(sorted(rows))
        entry = json.loads(rows[key])
        changed = mutate_value({k: entry[k] for k in ("value", "tensor")}, rng)
        if isinstance(changed, dict) and {"value", "tensor"} <= changed.keys():
            changed = entry_of(json.loads(key), changed["value"], changed["tensor"])
        database.execute("UPDATE records SET value = ? WHERE key = ?", (json.dumps(changed), key))


def use(folder):
    """All that reads a codebook's folder, or goes on with a build in it."""
    book, pool = SurvivorPool.load(folder)
    made = read_settings(book.config["settings"], folder)
    assert len(pool.features) == len(pool.rows) and made
    Codebook.load(folder)
    merge(folder, folder, folder.parent / "merged")


def go_on(folder, about):
    """Read an unfinished build as far as a build does that goes on with it."""
    with open_journal(folder, IMAGES_JOURNAL, about, PROBED) as journal:
        names = {name: name for name in journal.records}
        pooled(journal, names, names, {})


def case(originals, number):
    """One case: which file, how it was changed, and what came of it."""
    rng = random.Random(number)
    name = rng.choice(FILES)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "book")
        shutil.copytree(originals, folder)
        path = folder / name
        data = path.read_bytes()
        way = rng.choice(("bytes",) if name.endswith((".md", ".safetensors")) else ("bytes", "json"))
        about = read_entries(path)[None]["value"] if name == JOURNAL else {}
        if name == JOURNAL and way == "json":
            mutate_records(path, rng)
        else:
            path.write_bytes(mutate_json(data, rng, name) if way == "json" else mutate_bytes(data, rng))
        sealed = name in ("config.json", "README.md", JOURNAL) or rng.random() < 0.15
        if not sealed:
            reseal(folder)
        try:
            if name == JOURNAL:
                go_on(folder, about)
            else:
                use(folder)
        except CodebookError as error:
            assert "\n" not in str(error) and len(str(error)) <= 600
            return name, way, "refused"
        return name, way, "taken"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_originals(tmp_path_factory.mktemp("originals"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("start", range(0, 600, 100))
def test_mutated_files_are_refused_in_one_line_or_taken(originals, start):
    found = Counter(case(originals, number)[2] for number in range(start, start + 100))
    assert found["refused"] > 20 and found["taken"] > 3  # the mutations reach what they are to test
