"""pull, push, import and list on the command line, and codebooks that are named or found by themselves."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from PIL import Image
from safetensors.torch import save_file

from codebook import Codebook, miniature
from codebook.pruning import METHODS
from codebook.pruning.presets import SCHEDULE_PRESETS
from codebook.pruning.text import WITH_MASS
from codebook.store import known, registry
from codebook.store.known import find_named
from tests.hub import Hub, Repository, redirect, serving
from tests.store.books import make

ROOT = Path(__file__).parents[2]
NAME = "someone/their-book"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    with serving(Hub()) as hub:
        yield hub


@pytest.fixture
def book(hub, tmp_path):
    """The miniature's codebook by another name, and the images of its first prototypes."""
    shutil.copytree(ROOT / "indexes" / "miniature", tmp_path / "book")
    miniature.write_images(tmp_path / "images", 3)
    return tmp_path / "book"


def last(hub, name=NAME):
    repository = hub.repositories[name]
    return repository.commits[repository.refs["main"]]


def test_push_and_pull(run, refused, hub, book, tmp_path):
    code, out, _ = run("push", book, NAME, "--message", "First", "--json")
    said = json.loads(out)
    assert code == 0 and said["repository"] == NAME and said["commit"].startswith(constants.ENDPOINT)
    files = {path.name: path.read_bytes() for path in book.iterdir()}
    assert "horizon.json" in files and last(hub) == files | {".gitattributes": b""} and sorted(files) == said["files"]
    assert hub.repositories[NAME].messages[1:] == ["First"]

    code, out, _ = run("pull", NAME, "--json")
    said, folder = json.loads(out), find_named(NAME)
    assert code == 0 and said.pop("folder") == str(folder)
    assert said == {"name": NAME, "model": "miniature", "prototypes": 469, "dimension": 160}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    code, out, err = run("pull", NAME)
    assert code == 0 and out == f"{folder}\n" and "469 prototypes of dimension 160 for miniature" in err
    refused("pull", NAME, "--revision", "v9", words=["no revision 'v9'"])
    refused("pull", "someone/other", words=["no such repository"])
    refused("pull", "other", words=["no codebook 'other'", "llava-1.5-7b", "OWNER/NAME"])
    refused("push", tmp_path / "images", NAME, words=["no codebook in"])
    refused("push", book, "other", "--images", tmp_path / "nowhere", words=["no name of a repository"])


def test_a_horizon_goes_along_if_it_may_be_of_the_codebooks_models(run, refused, hub, book):
    horizon = json.loads((book / "horizon.json").read_text())
    family, tower, projector, decoder = horizon["fingerprint"].split(":")
    size, weights = projector.split("-")

    def push(fingerprint):
        (book / "horizon.json").write_text(json.dumps(horizon | {"fingerprint": fingerprint}))
        hub.repositories.clear()
        code, _, err = run("push", book, NAME)
        carried = "horizon.json" in last(hub)
        assert code == 0 and carried != ("horizon.json stays here: it is of another model" in err)
        return carried

    assert push(":".join([family, tower, projector, "9-0000"]))  # another language model behind the same tower
    assert not push(":".join([family, tower, f"{size}-{weights[:-4]}7f7f", decoder]))
    assert not push(None)
    (book / "horizon.json").write_text("{}")
    refused("push", book, NAME, words=["horizon.json is no horizon.json", "codebook horizon --out"])


def test_the_card(run, refused, hub, book, tmp_path):
    """What the options add; without them the README.md of the folder is pushed as it is."""
    (book / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    assert run("push", book, NAME)[0] == 0
    assert last(hub)["README.md"] == b"---\nlicense: mit\n---\nMy own words.\n"

    bench = ROOT / "benchmarks" / "publish" / "miniature.json"
    more = ["--licence", "apache-2.0", "--images", tmp_path / "images", "--bench", bench, "--private"]
    code, _, err = run("push", book, "someone/second", *more)
    card = last(hub, "someone/second")["README.md"].decode()
    assert code == 0 and hub.repositories["someone/second"].private and "no licence" not in err
    assert card.startswith("---\nlibrary_name: codebook\nlicense: apache-2.0\ntags:\n- visual-token-pruning\n")
    assert "base_model" not in card  # the miniature is not on the hub
    for line in (
        "| recurrent | 469 |", "| tau_p | 0.6 |", "| seeded | 85.4 ± 0.6 | 85.0 ± 0.6 | 82.1 ± 0.6 | 78.2 ± 0.6 |",
        "![tokens behind the prototypes](sheet.png)", "Built from 120 images, which are not part of it",
    ):  # fmt: skip
        assert line in card
    assert Image.open(io.BytesIO(last(hub, "someone/second")["sheet.png"])).width > 1000

    folder = json.loads(run("pull", "someone/second", "--json")[1])["folder"]
    run("push", folder, "someone/third")
    assert last(hub, "someone/third") == last(hub, "someone/second")  # nothing is lost on the way

    refused("push", book, NAME, "--licence", "two words", words=["licence", "apache-2.0"])
    refused("push", book, NAME, "--bench", book / "config.json", words=["config.json", "codebook bench"])
    refused("push", book, NAME, "--images", tmp_path / "book", words=["error"])
    other = json.loads(bench.read_text()) | {"model": "llava:1-00:1-00:0"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    refused("push", book, NAME, "--bench", tmp_path / "other.json", words=["measured on another model"])
    (book / "README.md").unlink()
    code, _, err = run("push", book, "someone/fourth")
    assert code == 0 and "names no licence: say it with --licence" in err
    assert "license: unknown" in last(hub, "someone/fourth")["README.md"].decode()


def test_who_pushes_hears_that_a_folder_of_this_machine_is_named(run, hub, book):
    config = json.loads((book / "config.json").read_text())
    assert "folder" not in run("push", book, NAME)[2]
    (book / "config.json").write_text(json.dumps(config | {"model": str(book)}))
    assert f"names its model as the folder {book}: all who pull it" in run("push", book, NAME)[2]


def test_a_damaged_codebook_is_not_pushed(refused, hub, book):
    (book / "provenance.jsonl").write_text("")
    refused("push", book, NAME, words=["provenance.jsonl is damaged"])
    assert not hub.asked


def test_import(run, refused, tmp_path):
    torch.save(torch.ones(2, 8).half(), tmp_path / "t.pt")
    (tmp_path / "t.json").write_text('["7", "8"]')
    given = ["import", tmp_path / "t.pt", "--images", tmp_path / "t.json", "--model", "org/model", "--out"]
    code, out, _ = run(*given, tmp_path / "out", "--json")
    assert code == 0 and json.loads(out) == {
        "folder": str(tmp_path / "out"), "model": "org/model", "prototypes": 2, "dimension": 8,
    }  # fmt: skip
    assert [row["image"] for row in Codebook.load(tmp_path / "out").provenance] == ["7", "8"]
    (tmp_path / "t.json").write_text('["7"]')
    refused(*given, tmp_path / "other", words=["1 records for 2 prototypes"])
    refused(*given, tmp_path / "t.pt", words=["is a file"])
    assert not (tmp_path / "other").exists()


def test_list(run, hub, monkeypatch):
    hub.repositories[NAME] = Repository()
    make().save(folder := Path(constants.HF_HUB_CACHE) / "book")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    sha = hub.repositories[NAME].commit(files)
    code, out, _ = run("list", "--json")
    found = json.loads(out)
    assert code == 0 and [one["name"] for one in found["codebooks"]] == ["eyes", "miniature"]
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = run("list")[1].splitlines()
        assert max(len(line) for line in lines if len(line.split()) > 1) in range(columns - 20, columns + 1)
    by_name = {one["name"]: one for one in found["registry"]}
    assert by_name["llava-1.5-7b"]["prototypes"] == 454 and by_name["llava-onevision-7b"]["dimension"] == 3584
    run("pull", NAME)
    code, out, _ = run("list", "--json")
    *_, pulled = json.loads(out)["codebooks"]
    assert (pulled["name"], pulled["origin"], pulled["revision"], pulled["prototypes"]) == (NAME, "hub", sha, 50)
    (Path(pulled["folder"]) / "config.json").unlink()
    (Path(pulled["folder"]) / "config.json").write_text("{")
    code, out, _ = run("list")
    assert "  seeded-middle: codebook-middle+mass (the default)\n" in out
    assert code == 0 and f"{NAME}: damaged (cannot read" in out and "llava-onevision-7b: 45 prototypes" in out


NO_TORCH = """
import sys
from codebook.cli import main
main(["list", "--json"])
from codebook.store import known, registry
from codebook.store.known import find_named
find_named("miniature")
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_a_list_needs_no_torch():
    done = subprocess.run([sys.executable, "-c", NO_TORCH], check=True, cwd=ROOT, capture_output=True)
    found = json.loads(done.stdout)
    assert found["methods"] == sorted(METHODS)
    named = {
        "restore": "divprune-merged+distance",
        "seeded": "codebook-farthest+mass",
        "seeded-middle": "codebook-middle+mass",
    }
    assert named.keys() == WITH_MASS.keys() and found["presets"] == named | SCHEDULE_PRESETS


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return miniature.write_images(tmp_path_factory.mktemp("scenes"), 1)[0]


def test_names_wherever_a_codebook_is_asked_for(run, hub, scene, tmp_path):
    one = ["--image", scene, "--ask", "describe.", "--keep", 0.1, "--codebook", "miniature"]
    assert run("prune", "miniature", *one)[0] == 0
    save_file({"t": torch.randn(10, 160, generator=torch.Generator().manual_seed(0))}, tmp_path / "t.safetensors")
    tokens = ["--tokens", tmp_path / "t.safetensors", "--output", tmp_path / "o.safetensors"]
    assert run("prune", *tokens, "--codebook", "miniature")[0] == 0
    assert json.loads(run("inspect", "miniature", "--json")[1])["prototypes"] == 469
    assert run("explain", "miniature", "--image", scene, "--patch", "1,1", "--codebook", "miniature")[0] == 0


def test_a_name_that_is_not_here(refused, hub, scene, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ask = ["prune", "miniature", "--image", scene, "--ask", "describe.", "--codebook"]
    refused(*ask, "llava-1.5-7b", words=["not on this machine", "`codebook pull llava-1.5-7b` fetches it"])
    refused(*ask, "some/folder", words=["no codebook in some/folder", "codebook build", "`codebook pull some/folder`"])
    refused(*ask, "folder", words=["no codebook in folder", "codebook list"])
    (tmp_path / "miniatures").mkdir()
    (tmp_path / "miniature.txt").touch()
    refused(*ask, "miniatures", words=["no codebook in miniatures: name another folder"])
    refused(*ask, "miniature.txt", words=["no codebook in miniature.txt, a file: name another folder"])
    assert not hub.asked
    refused(*ask, "some/folder", "--pull", words=["no such repository"])


def test_pull_beside_a_name(run, refused, hub, book, scene):
    """Fetched before the model is loaded, and refused where it is another model's."""
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit({path.name: path.read_bytes() for path in book.iterdir()})
    ask = ["prune", "miniature", "--image", scene, "--ask", "describe.", "--keep", 0.1, "--codebook"]
    assert run(*ask, NAME, "--pull")[0] == 0
    hub.asked.clear()
    assert run(*ask, NAME, "--pull")[0] == 0 and not hub.asked
    assert run(*ask, NAME)[0] == 0 and not hub.asked


def test_pull_for_a_model(run, refused, hub, book, scene, tmp_path, monkeypatch):
    """By the model's name in the registry: said without --pull, fetched with it, and then found by itself."""
    commit, names = 40 * "a", ("config.json", "prototypes.safetensors", "provenance.jsonl")
    files = {name: (book / name).read_bytes() for name in names}
    hub.plain = {f"/books/{commit}/{name}": data for name, data in files.items()}
    entry = {
        "name": "mini", "models": ["org/mini"], "prototypes": 469, "dimension": 160,
        "source": "https://example.org/books", "revision": commit, "licence": "mit", "images": "120 scenes",
        "converter": "folder",
        "files": {
            name: {"url": f"https://example.org/books/{commit}/{name}", "size": len(data),
                   "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }  # fmt: skip
    (tmp_path / "registry.json").write_text(json.dumps({"format": 1, "codebooks": [entry]}))
    shutil.copytree(ROOT / "codebook" / "miniature" / "weights", tmp_path / "org" / "mini")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(known, "folders", lambda: [])
    monkeypatch.setattr(registry, "REGISTRY", str(tmp_path / "registry.json"))
    registry.read_registry.cache_clear()
    redirect("example.org")
    try:
        ask = ["prune", "org/mini", "--image", scene, "--ask", "describe.", "--keep", 0.1, "--json"]
        refused(*ask, words=["`codebook pull mini` (or --pull)", "`codebook build org/mini --images", "divprune("])
        assert not hub.asked
        code, out, err = run(*ask, "--pull")
        assert code == 0 and len(json.loads(out)["kept"][0]) == 14 and "fetch mini" in err and len(hub.asked) == 3
        code, out, _ = run(*ask)
        assert code == 0 and len(json.loads(out)["kept"][0]) == 14 and len(hub.asked) == 3
        assert [one["name"] for one in json.loads(run("list", "--json")[1])["codebooks"]] == ["mini"]
    finally:
        monkeypatch.undo()
        registry.read_registry.cache_clear()
        set_client_factory(default_client_factory)
