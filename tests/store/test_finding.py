"""Which codebook a model finds by itself: by its name where our registry says so, else by its weights."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch import nn

from codebook import Codebook, CodebookError, models, prebuilt
from codebook.models import fingerprint, same_fingerprint
from codebook.store import known, registry, shipped
from codebook.store.known import entry_folder, folders
from codebook.store.registry import read_registry
from tests import tiny
from tests.store.books import make

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = "org/Tiny-7b"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """A registry with one entry; what it says of the fingerprint can be changed."""

    def write(said=None):
        address = f"https://example.org/{COMMIT}/"
        files = {name: {"url": address + name, "size": 1, "sha256": 64 * "0"} for name in ("tensor", "images")}
        one = {"name": "tiny-7b", "models": [HUB_ID], "prototypes": 50, "dimension": 48, "fingerprint": said,
               "source": "https://example.org/books", "revision": COMMIT, "licence": "mit", "images": "5 images",
               "converter": "released", "files": files}  # fmt: skip
        (tmp_path / "registry.json").write_text(json.dumps({"format": 1, "codebooks": [one]}))
        monkeypatch.setattr(registry, "REGISTRY", str(tmp_path / "registry.json"))
        read_registry.cache_clear()
        return read_registry()[0]

    yield write
    monkeypatch.undo()
    read_registry.cache_clear()


def named(name, seed=0):
    """A model that was loaded by this name."""
    model = tiny.llava(layers=1, seed=seed)
    model.config.name_or_path = name
    return model


def fetched(entry, **config):
    """The entry's codebook, as if it had been fetched."""
    make(d=48, **config).save(entry_folder(entry))
    return entry_folder(entry)


def pulled(name, commit="a" * 40, main=True, **options):
    """A codebook in the hub's cache, as its client puts it there."""
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    make(d=48, **options).save(repository / "snapshots" / commit)
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def missing(model):
    with pytest.raises(CodebookError) as caught:
        prebuilt(model)
    return str(caught.value)


def is_from(book, folder):
    return book.config == Codebook.load(folder).config


def test_by_the_name_that_the_registry_has(entry):
    one = entry()
    folder = fetched(one, model=HUB_ID)
    for name in (HUB_ID, "ORG/tiny-7B"):
        assert is_from(prebuilt(named(name)), folder)
    for name in ("", "Tiny-7b", "/models/Tiny-7b", "other/Tiny-7b", "org/Tiny-7b-finetune"):
        assert "no codebook for" in missing(named(name))


def test_a_name_is_not_believed_against_the_weights(entry):
    one = entry()
    fetched(one, model=HUB_ID, fingerprint=fingerprint(tiny.llava(layers=1, seed=1)))
    assert "no codebook for" in missing(named(HUB_ID))
    shutil.rmtree(entry_folder(one))
    make(d=16).save(entry_folder(one))  # nor against the dimension
    assert "no codebook for" in missing(named(HUB_ID))


def test_by_weights():
    folder = pulled("someone/book", model="whatever", fingerprint=fingerprint(tiny.llava(layers=1)))
    assert is_from(prebuilt(named("/a/folder")), folder)
    assert "no codebook for" in missing(named("/a/folder", seed=1))


def test_what_a_codebook_from_the_hub_says_does_not_choose_it():
    pulled("someone/book", model=HUB_ID)
    assert "no codebook for" in missing(named(HUB_ID))


def test_the_name_goes_before_the_weights(entry):
    folder = fetched(entry(), model=HUB_ID)
    pulled("someone/book", model=HUB_ID, fingerprint=fingerprint(tiny.llava(layers=1)))
    assert is_from(prebuilt(named(HUB_ID)), folder)


def test_what_ships_goes_before_what_was_fetched(entry, tmp_path, monkeypatch):
    own = fingerprint(tiny.llava(layers=1))
    make(d=48, seed=5, fingerprint=own, model="ships").save(tmp_path / "ships")
    monkeypatch.setattr(known, "folders", lambda: [tmp_path / "ships"])
    fetched(entry(), fingerprint=own)
    pulled("someone/book", fingerprint=own)
    assert prebuilt(named("")).config["model"] == "ships"


def test_of_two_from_the_hub_the_user_chooses():
    own = fingerprint(tiny.llava(layers=1))
    pulled("a/book", fingerprint=own)
    folder = pulled("b/book", commit="b" * 40, fingerprint=own, main=False)
    says = missing(named(""))
    assert "2 codebooks from the hub" in says and f"--codebook a/book or --codebook {folder}" in says


def test_one_revision_of_each():
    own = fingerprint(tiny.llava(layers=1))
    pulled("a/book", commit="b" * 40, fingerprint=own, seed=1)
    folder = Path(constants.HF_HUB_CACHE) / "models--a--book" / "snapshots"
    make(d=48, seed=2, fingerprint=own).save(folder / ("c" * 40))  # an older one, left in the cache
    assert is_from(prebuilt(named("")), folder / ("b" * 40))


def test_a_damaged_codebook_is_no_models():
    own = fingerprint(tiny.llava(layers=1))
    folder = pulled("a/book", fingerprint=own)
    (folder / "config.json").write_text("{")
    assert "no codebook for" in missing(named(""))
    (pulled("b/book", fingerprint=own) / "prototypes.safetensors").write_bytes(b"")
    with pytest.raises(CodebookError, match=r"prototypes\.safetensors is damaged"):  # it was the model's
        prebuilt(named(""))


@pytest.mark.parametrize(
    ("name", "said", "fetch", "build"),
    [
        (
            HUB_ID,
            False,
            "`codebook pull tiny-7b` (or --pull)",
            f"`codebook build {HUB_ID} --images",
        ),
        ("a b/c", True, "`codebook pull tiny-7b` (or --pull)", "`codebook build 'a b/c' --images IMAGES --out FOLDER`"),
        ("", False, "`codebook pull OWNER/NAME`", "`codebook build MODEL --images IMAGES --out FOLDER`"),
        ("/x" * 99, False, "`codebook pull OWNER/NAME`", "`codebook build MODEL --images IMAGES --out FOLDER`"),
    ],
)
def test_three_ways_on(entry, name, said, fetch, build):
    """Each with its command, in one line that is not cut."""
    entry(fingerprint(tiny.llava(layers=1)) if said else None)
    says = missing(named(name))
    for words in (fetch, build, "`--codebook FOLDER`", "`--method 'divprune(middle=True)+mass'`"):
        assert words in says
    assert len(says) < 600 and " ... " not in says and "\n" not in says


def test_the_commands_that_it_names_exist():
    from typer.main import get_command

    from codebook.cli import app

    commands = get_command(app).commands
    for words in re.findall(r"`codebook (\w+)", missing(named(HUB_ID))):
        assert words in commands
    assert Path(shipped.__file__).is_file() and folders()


# The fingerprint


@pytest.fixture(scope="module")
def miniature():
    return models.load("miniature", "cpu")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_survives_casts(dtype):
    """Of the shipped codebook's model, and of a model that was built in half precision."""
    model = models.load("miniature", "cpu")[0].to(dtype)
    assert prebuilt(model).config["model"] == "miniature"
    small = tiny.llava(layers=1).half()
    said = fingerprint(small)
    assert same_fingerprint(said, fingerprint(small.to(dtype)))
    assert same_fingerprint(said, fingerprint(tiny.llava(layers=1).to(torch.bfloat16).to(dtype)))


def test_it_survives_adapters_of_the_language_model(miniature):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)
    wrapper = peft.get_peft_model(models.load("miniature", "cpu")[0], config)
    assert fingerprint(wrapper) == fingerprint(miniature)
    assert prebuilt(wrapper).config["model"] == "miniature"
    assert fingerprint(wrapper.merge_and_unload()) == fingerprint(miniature)


def test_an_adapter_inside_the_tower_is_named():
    """Its outputs are others than those that the codebook was built from."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*vision_tower.*q_proj", init_lora_weights=False)
    wrapper = peft.get_peft_model(models.load("miniature", "cpu")[0], config)
    assert "its vision tower has an adapter" in missing(wrapper)
    with pytest.raises(CodebookError, match="another tower or projector: its vision tower has an adapter"):
        Codebook.load(folders()[0]).check(wrapper)


class Packed(nn.Linear):
    """A layer whose weights are stored as bitsandbytes stores them."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("part", "what"), [("model.vision_tower", "vision tower"), ("model.multi_modal_projector", "projector")]
)
def test_quantised_weights_are_named(entry, part, what):
    """They cannot be compared; a codebook of our registry without a fingerprint is still found by name."""
    model = named(HUB_ID)
    path = next(n for n, m in model.named_modules() if n.startswith(part) and isinstance(m, nn.Linear))
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, Packed(model.get_submodule(path)))
    pulled("a/book", fingerprint=fingerprint(tiny.llava(layers=1)))
    with pytest.raises(CodebookError, match=f"the {what} is quantised, .*llm_int8_skip_modules"):
        prebuilt(model)
    folder = fetched(entry(), model=HUB_ID)
    assert is_from(prebuilt(model), folder)


def test_a_quantised_language_model_changes_nothing():
    model = named("")
    for name, module in list(model.get_decoder().named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_decoder().get_submodule(parent), leaf, Packed(module))
    folder = pulled("a/book", fingerprint=fingerprint(tiny.llava(layers=1)))
    assert is_from(prebuilt(model), folder)
