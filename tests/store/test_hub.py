"""Codebooks on the hub: the real client, against a server on this machine that answers as the hub does."""

import contextlib
import hashlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from codebook.errors import CodebookError, quoted
from codebook.models.loading import read_config_of
from codebook.store import hub as sharing
from codebook.store.codebook import Codebook
from codebook.store.fetching import pull
from codebook.store.known import find_named, known
from tests.hub import Hub, Repository, serving, spoil
from tests.store.books import make

NAME = "someone/their-book"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the client."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "hub"


@pytest.fixture
def hub(cache):
    with serving(Hub()) as hub:
        yield hub


def files_of(book, folder, **others):
    book.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()} | others


@pytest.fixture
def shared(hub, tmp_path):
    """A codebook in a repository, beside files that are none of a codebook's."""
    repository = hub.repositories[NAME] = Repository()
    repository.commit(files_of(make(), tmp_path / "book", **{"run.py": b"print()", "model.bin": b"pickle"}))
    return repository


def same(a, b):
    assert torch.equal(a.prototypes, b.prototypes) and a.provenance == b.provenance
    return True


def test_pull(shared, hub, cache):
    book = Codebook.from_pretrained(NAME)
    assert same(book, make())
    [found] = [one for one in known() if one.origin == "hub"]
    assert (found.name, found.revision, found.current) == (NAME, shared.refs["main"], True)
    assert find_named(NAME) == found.folder and same(Codebook.load(found.folder), book)
    assert {path.name for path in found.folder.iterdir()} == {
        "config.json", "prototypes.safetensors", "provenance.jsonl", "README.md",
    }  # fmt: skip
    assert not [line for line in hub.asked if "run.py" in line or "model.bin" in line]
    hub.asked.clear()
    Codebook.from_pretrained(NAME)
    assert not [line for line in hub.asked if "/resolve/" in line]  # all of it is in the cache


def test_revisions(shared, tmp_path):
    first = shared.refs["main"]
    shared.commit(files_of(make(seed=1), tmp_path / "other"))
    shared.refs["v1"] = first
    assert same(Codebook.from_pretrained(NAME, "v1"), make())
    assert same(Codebook.from_pretrained(NAME, first), make())
    assert same(Codebook.load(find_named(NAME)), make())  # the one that is here
    assert same(Codebook.from_pretrained(NAME), make(seed=1))
    assert same(Codebook.load(find_named(NAME)), make(seed=1))  # main, now that it is here
    with pytest.raises(CodebookError, match="has no revision 'v9'; name a branch, a tag or a commit"):
        Codebook.from_pretrained(NAME, "v9")


ODD_REVISIONS = [
    "", "  ", "main ", "..", "../x", "a..b", ".a", "/a", "-v", "a//b", "a\nb", "a\0b", "?x", "x" * 300, 3, b"main",
]  # fmt: skip


def refused(words, ask, revision):
    with pytest.raises(CodebookError, match=words):
        ask(NAME, revision=revision)


@pytest.mark.parametrize("ask", [Codebook.from_pretrained, read_config_of])
def test_what_can_be_no_revision_is_refused_before_the_hub_is_asked(shared, hub, ask):
    for odd in ODD_REVISIONS:
        refused(f"{re.escape(quoted(odd))} is no revision: name a branch, a tag or a commit, or leave", ask, odd)
    assert not hub.asked
    for fine in ("v1.0", "refs/pr/1", "feature/a-b", "a" * 40, "é"):
        refused(f"it has no revision '{fine}'; name a branch, a tag or a commit", ask, fine)


def test_a_folder_has_no_revisions(tmp_path):
    make().save(tmp_path)
    with pytest.raises(CodebookError, match="on this machine and has one revision: leave the revision out"):
        Codebook.from_pretrained(tmp_path, "v1")


def test_two_revisions_without_a_main(shared, tmp_path):
    first, second = shared.refs["main"], shared.commit(files_of(make(seed=1), tmp_path / "other"))
    for revision in (first, second):
        Codebook.from_pretrained(NAME, revision)
    with pytest.raises(CodebookError, match=f"2 revisions of {NAME} are in the cache: name the folder"):
        find_named(NAME)


def test_folders_go_before_names(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(seed=7).save(Path(NAME))
    assert same(Codebook.from_pretrained(NAME), make(seed=7))
    assert find_named(NAME) == Path(NAME)


def test_nobody_is_there(cache):
    for ask in (Codebook.from_pretrained, read_config_of):
        refused(r"cannot .*: its revision 'v1' is not whole in the .*cache, and .* is not reached", ask, "v1")
    with pytest.raises(CodebookError, match=r"cannot pull .*: it is not whole in the cache, and .* is not reached"):
        Codebook.from_pretrained(NAME)
    assert all(book.origin == "shipped" for book in known())


def test_a_hub_that_says_nothing(cache, monkeypatch):
    """It takes connections and never answers: the client itself would wait for ever."""
    monkeypatch.setattr(sharing, "HUB_WAIT", 0.2)
    hooks = list(get_session().event_hooks["request"])
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        deaf.bind(("127.0.0.1", urlsplit(constants.ENDPOINT).port))
        deaf.listen(64)
        for ask in (
            lambda: Codebook.from_pretrained(NAME),
            lambda: make().push_to_hub(NAME),
            lambda: sharing.pull_data_set(NAME, list),
        ):
            start = time.monotonic()
            with pytest.raises(CodebookError, match="is not reached: check the connection"):
                ask()
            assert time.monotonic() - start < 30
    assert get_session().event_hooks["request"] == hooks


def test_offline(hub, shared, cache, monkeypatch):
    with pytest.raises(CodebookError, match="not whole in the cache"):
        Codebook.from_pretrained(NAME, local_files_only=True)
    assert not hub.asked
    Codebook.from_pretrained(NAME)
    hub.asked.clear()
    assert same(Codebook.from_pretrained(NAME, local_files_only=True), make())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(Codebook.from_pretrained(NAME), make()) and not hub.asked
    with pytest.raises(CodebookError, match="not whole in the cache, and HF_HUB_OFFLINE is set"):
        Codebook.from_pretrained("someone/other")
    with pytest.raises(CodebookError, match="cannot push to someone/other: HF_HUB_OFFLINE is set: unset it"):
        make().push_to_hub("someone/other")


def test_the_cache_serves_while_the_hub_is_out_of_order(hub, shared):
    hub.status = 404
    with pytest.raises(CodebookError, match=r"the hub answers 404|no such repository"):
        Codebook.from_pretrained(NAME)
    hub.status = None
    Codebook.from_pretrained(NAME)
    hub.status = 500
    assert same(Codebook.from_pretrained(NAME), make())


@pytest.mark.parametrize("name", ["nobody/nothing", "someone/their-book2"])
def test_no_repository(shared, name):
    with pytest.raises(CodebookError, match=f"cannot pull {name}: no such repository, or you may not see it"):
        Codebook.from_pretrained(name)


@pytest.mark.parametrize(
    "name",
    [
        "nothing", "a/b/c", "a/../b", "-a/b", "a b/c", "https://huggingface.co/a/b", "a/" + 99 * "b", "a/b-", "a/b.git",
        "a/b--c", "a/b..c", "a/é", "./a/b", "a/b/",
    ],
)  # fmt: skip
def test_no_name(hub, name):
    with pytest.raises(CodebookError, match="no codebook"):
        Codebook.from_pretrained(name)
    assert not hub.asked


@pytest.mark.parametrize(
    "name", ["a/b", "_a/b_", "A.b-c/1", "a" * 96 + "/b", "a/" + "b" * 97, "a/b.", "a/b.gits", "a/b\n"]
)
def test_names_are_those_that_the_hubs_client_takes(name):
    def taken(check, error):
        with contextlib.suppress(error):
            check(name)
            return True

    assert taken(sharing.check_hub_name, CodebookError) == taken(validate_repo_id, HFValidationError)


def test_another_kind_of_repository(hub):
    """A model has a config.json and weights too; nothing of it is fetched."""
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit({"config.json": b"{}", "model.safetensors": b"", "README.md": b"# A model"})
    with pytest.raises(CodebookError, match=r"is no codebook: it has no prototypes\.safetensors"):
        Codebook.from_pretrained(NAME)
    assert not [line for line in hub.asked if "/resolve/" in line]


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"prototypes.safetensors": 2**32 + 1}, "prototypes.safetensors of .* has 4,294,967,297 bytes: at most"),
        ({"config.json": 2**24 + 1}, "config.json of .* at most 16,777,216 are fetched"),
        (
            {"provenance.jsonl": 2**30, "prototypes.safetensors": 2**32 - 2**29},
            "has 4,8.* bytes: at most 4,294,967,296",
        ),
    ],
)
def test_too_large(hub, shared, sizes, says):
    hub.announced = sizes
    with pytest.raises(CodebookError, match=says):
        Codebook.from_pretrained(NAME)
    assert not [line for line in hub.asked if "/resolve/" in line]


def test_damaged_on_the_way_once(hub, shared):
    """As many bytes as announced, but others: found by the codebook's own SHA-256, and fetched again."""
    first = [spoil]
    hub.spoiled["prototypes.safetensors"] = lambda data: first.pop()(data) if first else data
    assert same(Codebook.from_pretrained(NAME), make())


@pytest.mark.parametrize("name", ["prototypes.safetensors", "provenance.jsonl", "config.json"])
def test_damaged_for_good(hub, shared, name):
    hub.spoiled[name] = spoil if name != "config.json" else lambda data: b"[" + data[1:]
    with pytest.raises(CodebookError, match=f"the files of {NAME} do not belong together: .*{name}"):
        Codebook.from_pretrained(NAME)
    assert all(book.origin == "shipped" for book in known())
    del hub.spoiled[name]
    assert same(Codebook.from_pretrained(NAME), make())


def test_the_connection_breaks_off(hub, shared):
    """The client goes on where it was, by a range of bytes."""
    first = [lambda data: data[:1000]]
    hub.spoiled["prototypes.safetensors"] = lambda data: first.pop()(data) if first else data
    assert same(Codebook.from_pretrained(NAME), make())
    assert sum("GET" in line and "prototypes" in line for line in hub.asked) == 2


def test_hostile_contents(hub, shared, tmp_path):
    """What is well announced and sealed is still read by the reader that every codebook is read by."""
    files = files_of(make(), tmp_path / "evil")
    files["prototypes.safetensors"] = b"\xff" * 64
    config = json.loads(files["config.json"])
    config["sha256"]["prototypes.safetensors"] = hashlib.sha256(files["prototypes.safetensors"]).hexdigest()
    shared.commit(files | {"config.json": json.dumps(config).encode()})
    with pytest.raises(CodebookError, match=r"cannot read .*prototypes.safetensors"):
        Codebook.from_pretrained(NAME)


PULL = "import sys\nfrom codebook.store.hub import pull_repository\nprint(pull_repository(sys.argv[1]))\n"


def start(cache):
    """A process that pulls, into this cache; its client has the server's address from the environment."""
    import os

    where = os.environ | {"HF_HUB_CACHE": str(cache)}
    words = [sys.executable, "-c", PULL, NAME]
    return subprocess.Popen(words, env=where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_pulls_at_once(hub, shared, cache):
    hub.pause = 0.05
    pulls = [start(cache) for _ in range(2)]
    results = [one.communicate(timeout=60) for one in pulls]
    assert [one.returncode for one in pulls] == [0, 0], results
    [folder] = {out.strip() for out, _ in results}
    assert same(Codebook.load(folder), make())


def test_a_pull_that_is_killed_goes_on(hub, shared, cache, tmp_path):
    book = make(n=4000, d=64)
    shared.commit(files_of(book, tmp_path / "large"))
    hub.pause = 0.2
    killed = start(cache)
    until = time.monotonic() + 30
    while not any("GET" in line and "prototypes" in line for line in hub.asked) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)  # in the middle of its 16 chunks
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close(), killed.stderr.close()
    assert all(book.origin == "shipped" for book in known())
    with pytest.raises(CodebookError, match="none pulled"):
        find_named(NAME)
    hub.pause = 0
    assert same(Codebook.from_pretrained(NAME), book)


# Pushing


def test_push_and_pull(hub):
    book = make(model="org/model-7b", funnel={"probed": 90, "recurrent": 50}, settings={"tau_p": 0.15})
    address = book.push_to_hub(NAME, commit_message="The first one", licence="cc-by-4.0")
    repository = hub.repositories[NAME]
    assert address.endswith(f"/commit/{repository.refs['main']}") and repository.messages[1:] == ["The first one"]
    card = repository.commits[repository.refs["main"]]["README.md"].decode()
    assert re.match(r"---\nlibrary_name: codebook\nlicense: cc-by-4.0\nbase_model: org/model-7b\ntags:\n- visual", card)
    assert "| probed | 90 |" in card and "| tau_p | 0.15 |" in card
    again = Codebook.from_pretrained(NAME)
    assert same(again, book) and again.config["funnel"] == book.config["funnel"]


def test_what_is_pushed_is_what_is_saved(hub, tmp_path):
    book = make(model="org/model")
    book.save_pretrained(tmp_path / "book")
    book.push_to_hub(NAME)
    repository = hub.repositories[NAME]
    saved = {path.name: path.read_bytes() for path in (tmp_path / "book").iterdir()}
    assert repository.commits[repository.refs["main"]] == saved | {".gitattributes": b""}


def test_privacy(hub, shared):
    make().push_to_hub("someone/secret", private=True)
    assert hub.repositories["someone/secret"].private
    with pytest.raises(CodebookError, match=f"{NAME} is there and public: change that in its settings"):
        make().push_to_hub(NAME, private=True)
    assert len(shared.commits) == 1


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (
            lambda hub: setattr(hub, "status", 401),
            "the hub answers 401 .*; log in with `hf auth login`|no such repository",
        ),
        (lambda hub: setattr(hub, "status", 500), "the hub answers 500 .*again later"),
    ],
)
def test_a_push_that_fails(hub, shared, prepare, says):
    prepare(hub)
    with pytest.raises(CodebookError, match=f"cannot push to {NAME}: {says}"):
        make(seed=1).push_to_hub(NAME)
    assert len(shared.commits) == 1
    for name in ("nobody", "a/b/c", "", None):
        with pytest.raises(CodebookError, match="no name of a repository"):
            make().push_to_hub(name)


def test_licences_are_words(hub):
    for licence in ("two words", "a\nb", "MIT?", 70 * "x"):
        with pytest.raises(CodebookError, match="none that the Hub knows"):
            make().push_to_hub(NAME, licence=licence)
    assert not hub.asked


def test_limits_are_those_of_the_files():
    assert {name: sharing._limit(name) for name in sharing.SHARED} == {
        "config.json": 2**24, "prototypes.safetensors": 2**32, "provenance.jsonl": 2**30, "README.md": 2**24,
        "sheet.png": 2**26, "horizon.json": 2**24, "images.jsonl": 2**30, "survivors.safetensors": 2**32,
        "probes.jsonl": 2**30,
    }  # fmt: skip


def test_names_that_ship():
    assert pull("miniature").name == "miniature"
    with pytest.raises(CodebookError, match="one revision"):
        pull("miniature", "main")
