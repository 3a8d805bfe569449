"""The registry: its entries are as they must be, and what they name is fetched, checked, converted and kept."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from codebook.errors import CodebookError
from codebook.store import fetching, registry
from codebook.store.codebook import Codebook
from codebook.store.fetching import fetch_entry, pull
from codebook.store.known import entry_folder, find_named, folders, known
from codebook.store.registry import RegistryEntry, entry_for, entry_named, read_registry
from tests.hub import UNKNOWN_LENGTH, Hub, redirect, serving, spoil
from tests.store.books import make

ROOT = Path(__file__).parents[2]
HOST = "raw.githubusercontent.com"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RELEASED = os.environ.get("CODEBOOK_RELEASED")


def entry(files, **changes):
    """An entry as JSON has it, for files by name; they lie at the address of a commit."""
    return {
        "name": "tiny", "models": ["org/Tiny-7b"], "prototypes": 5, "dimension": 8,
        "source": "https://github.com/org/books", "revision": COMMIT, "licence": "mit", "images": "5 images",
        "converter": "released",
        "files": {
            name: {"url": f"https://{HOST}/org/books/{COMMIT}/{name}", "size": len(data),
                   "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    } | changes  # fmt: skip


def released():
    out = io.BytesIO()
    torch.save(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).half(), out)
    return {"tensor": out.getvalue(), "images": b'["7", "7", "8", "9", "10"]'}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / "codebook"


@pytest.fixture
def hub(cache):
    with serving(Hub()) as hub:
        redirect(HOST)
        yield hub
    set_client_factory(default_client_factory)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Make these entries the registry's."""

    def write(*entries):
        (tmp_path / "registry.json").write_text(json.dumps({"format": 1, "codebooks": list(entries)}))
        monkeypatch.setattr(registry, "REGISTRY", str(tmp_path / "registry.json"))
        read_registry.cache_clear()
        return read_registry()

    yield write
    monkeypatch.undo()
    read_registry.cache_clear()


@pytest.fixture
def tiny(hub, written):
    """A registry with one entry, whose files are there."""
    files = released()
    hub.plain = {f"/org/books/{COMMIT}/{name}": data for name, data in files.items()}
    return written(entry(files))[0]


# The file that ships. A pull request that adds an entry is checked by these: CONTRIBUTING.md, A codebook.


def test_the_registry_that_ships():
    names = [entry.name for entry in read_registry()]
    assert {"llava-1.5-7b", "llava-onevision-7b"} <= set(names)
    assert not set(names) & {folder.name for folder in folders()}


@pytest.mark.parametrize("change", [
    {"name": "Upper"}, {"name": "a/b"}, {"name": ""}, {"models": []}, {"models": ["no-owner"]}, {"prototypes": 0},
    {"dimension": "8"}, {"revision": "main"}, {"revision": COMMIT[:12]}, {"revision": COMMIT.upper()},
    {"licence": "Apache 2"}, {"images": ""}, {"images": "a\nb"}, {"images": 301 * "x"}, {"converter": "pickle"},
    {"source": "http://github.com/org/books"}, {"source": "git@github.com:org/books"}, {"surplus": 1},
])  # fmt: skip
def test_entries_are_refused(written, change):
    with pytest.raises(CodebookError, match=r"cannot read .*codebooks.0.*CONTRIBUTING.md"):
        written(entry(released(), **change))


@pytest.mark.parametrize("change", [
    {"url": f"http://{HOST}/org/books/{COMMIT}/tensor"},
    {"url": f"https://{HOST}/org/books/main/tensor"},
    {"url": f"https://{HOST}/org/books/{COMMIT}/../main/tensor"},
    {"url": f"https://user:secret@{HOST}/{COMMIT}/tensor"},
    {"url": f"https://{HOST}:8080/{COMMIT}/tensor"},
    {"url": f"https://{HOST}/{COMMIT}/tensor?raw=1"},
    {"url": f"https://{HOST}/{COMMIT}/%2e%2e/tensor"},
    {"url": f"file:///{COMMIT}/tensor"},
    {"size": 0}, {"size": 2**32 + 1}, {"size": "9"}, {"sha256": 64 * "G"}, {"sha256": 63 * "0"}, {"md5": "0"},
])  # fmt: skip
def test_files_of_entries_are_refused(written, change):
    wrong = entry(released())
    wrong["files"]["tensor"] |= change
    with pytest.raises(CodebookError, match=r"cannot read .*codebooks.0.*CONTRIBUTING.md"):
        written(wrong)


def test_registries_are_refused(written):
    one = entry(released())
    for others, says in (
        ([one, one | {"models": ["org/other"]}], "name tiny has two entries"),
        ([one, one | {"name": "other", "models": ["ORG/tiny-7B"]}], "model org/tiny-7b has two entries"),
        ([one | {"files": {"tensor": one["files"]["tensor"]}}], "files must be images, tensor"),
        ([one | {"converter": "folder"}], "files must be config.json, prototypes.safetensors, provenance.jsonl"),
    ):
        with pytest.raises(CodebookError, match=says):
            written(*others)


def test_entries_by_name_and_model(tiny):
    assert entry_named("tiny") is tiny and entry_named("Tiny") is None
    assert entry_for("org/tiny-7B") is tiny and entry_for("org/tiny") is None and entry_for("") is None


# Fetching


def test_fetch(tiny, hub, cache):
    ticks = []
    with pytest.raises(CodebookError, match="is not on this machine: `codebook pull tiny` fetches it"):
        find_named("tiny")
    folder = pull("tiny", tick=ticks.append)
    assert folder == cache / "tiny" / COMMIT == find_named("tiny") and ticks[-1] == sum(
        f.size for f in tiny.files.values()
    )
    book = Codebook.load(folder)
    assert book.prototypes.equal(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).half().float())
    assert [row["image"] for row in book.provenance] == ["7", "7", "8", "9", "10"]
    assert book.config["model"] == "org/Tiny-7b" and book.config["licence"] == "mit"
    assert book.config["source"] == tiny.files["tensor"].url
    card = (folder / "README.md").read_text()
    assert "license: mit\nbase_model: org/Tiny-7b\n" in card and "Built from 5 images." in card
    assert {path.name for path in (cache / "tiny").iterdir()} == {COMMIT}
    [found] = [one for one in known() if one.origin == "registry"]
    assert (found.name, found.folder, found.revision) == ("tiny", folder, COMMIT)
    hub.asked.clear()
    assert Codebook.from_pretrained("tiny").config == book.config and not hub.asked


@pytest.mark.parametrize("name", ["tensor", "images"])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        (spoil, "is not the file of the registry: its SHA-256 differs; report it"),
        (lambda data: data + b"x", "is not the file of the registry: it has .* bytes and not"),
        (lambda data: b"", "is not the file of the registry: it has 0 bytes|cannot fetch"),
        (lambda data: b"<html>", "is not the file of the registry: it has 6 bytes"),
    ],
)
def test_other_files(tiny, hub, cache, name, how, says):
    path = f"/org/books/{COMMIT}/{name}"
    hub.plain[path], good = how(hub.plain[path]), hub.plain[path]
    with pytest.raises(CodebookError, match=says):
        pull("tiny")
    assert not list(cache.rglob("config.json")) and not list(cache.rglob("*.tmp"))
    hub.plain[path] = good
    assert len(Codebook.from_pretrained("tiny")) == 5


def test_a_file_without_end(tiny, hub, cache, monkeypatch):
    """A server that does not announce how many bytes it sends: reading ends behind the last one that belongs there."""
    path = f"/org/books/{COMMIT}/tensor"
    hub.spoiled[path], hub.announced[path] = lambda data: data + bytes(2**24), UNKNOWN_LENGTH
    written = []
    monkeypatch.setattr(fetching, "CHUNK", 2**16)
    with pytest.raises(CodebookError, match=f"it has more than {len(hub.plain[path])} bytes; report it"):
        pull("tiny", tick=written.append)
    assert sum(written) <= len(hub.plain[path]) and not [p for p in cache.rglob("*") if p.is_file()]


def test_a_connection_that_breaks_off(tiny, hub, cache):
    path = f"/org/books/{COMMIT}/tensor"
    hub.spoiled[path], hub.announced[path] = lambda data: data[:100], len(hub.plain[path])
    with pytest.raises(CodebookError, match=r"cannot fetch .*; run the same command again"):
        pull("tiny")
    assert not [p for p in cache.rglob("*") if p.is_file()]
    hub.spoiled.clear()
    assert len(Codebook.from_pretrained("tiny")) == 5


def test_a_file_that_is_there_is_not_fetched_again(tiny, hub):
    path = f"/org/books/{COMMIT}/images"
    good = hub.plain.pop(path)
    with pytest.raises(CodebookError, match="the server answers 404"):
        pull("tiny")
    hub.plain[path] = good
    hub.asked.clear()
    pull("tiny")
    assert hub.asked == [f"GET {path}"]


def test_a_damaged_cache_is_fetched_again(tiny, hub):
    folder = pull("tiny")
    (folder / "prototypes.safetensors").write_bytes(b"damaged")
    assert len(Codebook.from_pretrained("tiny")) == 5


def test_offline(tiny, hub, cache, monkeypatch):
    with pytest.raises(CodebookError, match="not in the cache, and nothing may be fetched"):
        Codebook.from_pretrained("tiny", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CodebookError, match="not in the cache, and nothing may be fetched"):
        Codebook.from_pretrained("tiny")
    assert not hub.asked and not cache.exists()


def test_what_the_registry_says_of_a_codebook(hub, written):
    files = released()
    hub.plain = {f"/org/books/{COMMIT}/{name}": data for name, data in files.items()}
    [wrong] = written(entry(files, prototypes=6))
    with pytest.raises(CodebookError, match=r"tiny is \(5, 8\) and not as the registry says"):
        fetch_entry(wrong)
    assert not entry_folder(wrong).exists()


def test_a_folder_as_it_is(hub, written, tmp_path):
    """What `codebook push` made, at a commit."""
    make(funnel={"probed": 9}).save(tmp_path / "book")
    names = ("config.json", "prototypes.safetensors", "provenance.jsonl")
    files = {name: (tmp_path / "book" / name).read_bytes() for name in names}
    hub.plain = {f"/org/books/{COMMIT}/{name}": data for name, data in files.items()}
    [one] = written(entry(files, converter="folder", prototypes=50, dimension=16))
    folder = fetch_entry(one)
    assert {name: (folder / name).read_bytes() for name in names} == files
    assert Codebook.load(folder).config["funnel"] == {"probed": 9}


def test_what_is_no_tensor(hub, written):
    """A file with the right digest may still be hostile: it was reviewed by people."""
    files = released() | {"tensor": b"PK\x05\x06" + bytes(18)}
    hub.plain = {f"/org/books/{COMMIT}/{name}": data for name, data in files.items()}
    [wrong] = written(entry(files))
    with pytest.raises(CodebookError, match="holds no tensor that can be read without running code"):
        fetch_entry(wrong)
    assert not entry_folder(wrong).exists()


PULL = """
import sys
from tests.hub import redirect
from codebook.store import registry
registry.REGISTRY = sys.argv[1]
redirect(sys.argv[2])
from codebook.store.fetching import pull
print(pull("tiny"))
"""


def test_two_pulls_at_once(hub, cache, written, tmp_path):
    """One fetches, the other one waits for it."""
    make().save(tmp_path / "book")
    names = ("config.json", "prototypes.safetensors", "provenance.jsonl")
    files = {name: (tmp_path / "book" / name).read_bytes() for name in names}
    hub.plain = {f"/org/books/{COMMIT}/{name}": data for name, data in files.items()}
    written(entry(files, converter="folder", prototypes=50, dimension=16))
    hub.pause = 0.3
    where = os.environ | {"HF_ASSETS_CACHE": str(tmp_path / "assets"), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", PULL, registry.REGISTRY, HOST]
    pulls = [
        subprocess.Popen(words, env=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "12"
    ]
    results = [one.communicate(timeout=60) for one in pulls]
    assert [one.returncode for one in pulls] == [0, 0], results
    assert {out.strip() for out, _ in results} == {str(cache / "tiny" / COMMIT)}
    assert len(Codebook.load(find_named("tiny"))) == 50 and len(hub.asked) == 3


# The codebooks that the authors published


@pytest.mark.skipif(RELEASED is None, reason="set CODEBOOK_RELEASED to the published codebooks")
@pytest.mark.parametrize(
    ("name", "shape", "first"), [("llava-1.5-7b", (454, 4096), None), ("llava-onevision-7b", (45, 3584), "213546")]
)
def test_the_published_codebooks(hub, name, shape, first):
    published = {path.name: path for path in Path(RELEASED).glob("*/*") if path.suffix in (".pt", ".json")}
    one = entry_named(name)
    for file in one.files.values():
        hub.plain[file.url.removeprefix(f"https://{HOST}")] = published[file.url.rpartition("/")[2]].read_bytes()
    book = Codebook.from_pretrained(name)
    assert book.prototypes.shape == shape and book.config["licence"] == "apache-2.0"
    tensor, images = (published[one.files[kind].url.rpartition("/")[2]] for kind in ("tensor", "images"))
    assert [row["image"] for row in book.provenance] == json.loads(images.read_text())
    assert book.prototypes.equal(torch.load(tensor, "cpu", weights_only=True).float())
    if first:
        assert book.provenance[0]["image"] == first
    similarity, index = book.search(book.prototypes[:9])
    assert similarity.min() > 0.9999 and index[:, 0].tolist()[0] == 0


def test_entries_are_frozen(tiny):
    assert isinstance(tiny, RegistryEntry)
    with pytest.raises(ValueError):
        tiny.name = "other"
