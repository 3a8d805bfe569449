import copy
import os
import pickle
import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from codebook.errors import CodebookError
from codebook.models import fingerprint
from codebook.store import search
from codebook.store.codebook import Codebook
from tests import tiny
from tests.store.books import make, reseal, tokens


def test_redundancy_is_the_highest_cosine():
    book, x = make(), tokens(6).reshape(2, 3, 16)
    expected = torch.nn.functional.cosine_similarity(x[:, :, None], book.prototypes, dim=-1).amax(dim=-1)
    torch.testing.assert_close(book.redundancy(x), expected)
    assert book.redundancy(x.half()).dtype == torch.float32
    assert book.redundancy(x[:0]).shape == (0, 3)
    torch.testing.assert_close(book.redundancy(3 * book.prototypes[:5]), torch.ones(5))
    assert book.redundancy(torch.zeros(1, 16)).item() == 0
    with torch.autocast("cpu", torch.bfloat16):
        found = book.redundancy(x)
    assert torch.equal(book.redundancy(x), found)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_backends_agree(k):
    pytest.importorskip("faiss")
    book, x = make(), tokens(200)
    similarity, found = book.search(x, k, backend="torch")
    other, other_found = book.search(x, k, backend="faiss")
    torch.testing.assert_close(similarity, other)
    assert torch.equal(found, other_found)
    kept = [s[:, 0].argsort()[:40].sort().values for s in (similarity, other)]
    assert torch.equal(*kept)


def test_auto_takes_faiss_for_large_codebooks_only(monkeypatch):
    pytest.importorskip("faiss")
    book, x, used = make(), tokens(), []
    monkeypatch.setattr(
        search.PrototypeSearch, "_by_faiss", lambda self, *a: used.append("faiss") or self._by_torch(*a)
    )
    book.search(x)
    assert not used
    monkeypatch.setattr(search, "FAISS_FROM", 50)
    book.search(x)
    assert used == ["faiss"]


def test_gradients_are_the_same_however_large_the_codebook(monkeypatch):
    book, gradients = make(), []
    for many in (search.FAISS_FROM, 1):
        monkeypatch.setattr(search, "FAISS_FROM", many)
        x = tokens().requires_grad_()
        (book.redundancy(x).sum() + book.search(x, 2)[0].sum()).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].any()


def test_without_faiss_torch_answers(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(search, "FAISS_FROM", 1)
    book = make()
    assert torch.equal(book.search(tokens())[1], book.search(tokens(), backend="torch")[1])
    with pytest.raises(CodebookError, match=r"pip install 'redundancy-codebook\[cpu\]'"):
        book.search(tokens(), backend="faiss")


def test_chunks_change_nothing(monkeypatch):
    book, x = make(), tokens()
    whole = book.search(x, 2)
    monkeypatch.setattr(search, "SIMILARITIES_HELD", 150)
    parts = book.search(x, 2)
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda book: book.redundancy(torch.zeros(3, 8)), "built for some/model, has dimension 16"),
        (lambda book: book.search(tokens(), k=51), "k is 51"),
        (lambda book: book.search(tokens(), k=0), "k is 0"),
        (lambda book: book.search(tokens(), backend="annoy"), "no search backend 'annoy'"),
        (lambda book: book.extend(torch.zeros(3, 8)), "cannot extend a codebook of dimension 16"),
        (lambda book: book.redundancy(torch.ones(3, 16).to(torch.int8)), r"tokens are \(3, 16\) torch.int8: give proj"),
        (lambda book: book.similarity(torch.ones(3, 16, dtype=torch.complex64)), "torch.complex64: give proj"),
        (lambda book: book.search(numpy.ones((3, 16))), "tokens are of type ndarray: give projector outputs, a tensor"),
        (lambda book: book.search(torch.ones(2, 3, 16)), r"tokens are \(2, 3, 16\) but this codebook"),
        (lambda book: book.extend(torch.ones(3, 16).to(torch.int8)), "with prototypes .* torch.int8: take proj"),
        (lambda book: Codebook(numpy.ones((3, 16))), r"prototypes are of type ndarray: they must be \(N, d\) float32"),
        (lambda book: book.extend(torch.ones(3, 16), [{}]), "1 records for 3 prototypes"),
        (lambda book: Codebook(torch.zeros(0, 16)), r"must be \(N, d\) float32, N >= 1"),
        (lambda book: Codebook(torch.zeros(2, 16).half()), "must be .* float32"),
        (lambda book: Codebook(torch.full((2, 16), torch.nan)), "NaN"),
        (lambda book: Codebook(torch.tensor([[1.0, 0.0], [0.0, 0.0]])), "prototype 1 points nowhere"),
        (lambda book: Codebook(torch.tensor([[3e38, 3e38], [0.0, 1.0]])), "prototype 0 points nowhere"),
    ],
)
def test_wrong_use(call, message):
    with pytest.raises(CodebookError, match=message):
        call(make())


def test_the_tensor_of_which_it_was_made_may_change():
    given, x = tokens(5), tokens(9)
    book = Codebook(given)
    before = book.redundancy(x)
    given.copy_(tokens(5).flip(0) + 1)
    assert torch.equal(book.redundancy(x), before) and not torch.equal(Codebook(given).redundancy(x), before)


@pytest.mark.parametrize("inference", [True, False])
def test_prototypes_changed_in_place_are_refused(inference, tmp_path):
    """What searches them has normalised copies."""
    with torch.inference_mode(inference):
        book = Codebook(tokens(5))
    for copied in (copy.copy(book), copy.deepcopy(book), pickle.loads(pickle.dumps(book))):
        assert torch.equal(copied.redundancy(tokens()), book.redundancy(tokens()))
    book.prototypes[2] = 1
    for use in (
        lambda: book.redundancy(tokens()),
        lambda: book.similarity(tokens()),
        lambda: book.search(tokens()),
        lambda: book.save(tmp_path / "book"),
        lambda: book.extend(tokens(2)),
        lambda: copy.deepcopy(book),
    ):
        with pytest.raises(CodebookError, match=r"changed in place, .*: make another one, `Codebook\(prototypes, prov"):
            use()
    with pytest.raises(AttributeError):
        book.prototypes = tokens(5)


def test_extend():
    book = make(images_sha256="a build's")
    more = book.extend(tokens(4).half(), [{"cluster": 9}] * 4)
    assert len(more) == 54 and len(book) == 50 and more.provenance[-1] == {"cluster": 9}
    assert more.config["extended_by"] == 4 and more.config["prototypes"] == 54
    assert "images_sha256" not in more.config


def test_round_trip_with_the_same_bytes(tmp_path):
    book = make(funnel={"probed": 90, "recurrent": 50}, fingerprint="llava:1")
    book.save(tmp_path / "a")
    loaded = Codebook.load(tmp_path / "a")
    assert torch.equal(loaded.prototypes, book.prototypes)
    assert loaded.provenance == book.provenance and loaded.config == book.config
    loaded.save(tmp_path / "b")
    loaded.save(tmp_path / "b")  # over itself
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert len(list((tmp_path / "b").iterdir())) == 4
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: codebook\n") and "| probed | 90 |" in card


def test_check():
    model = tiny.llava(layers=1)
    own = fingerprint(model)
    make(d=48, fingerprint=own).check(model)
    make(d=48).check(model)  # an imported one has none
    with pytest.raises(CodebookError, match=r"has dimension 16, and the visual tokens of this model have 48"):
        make().check(model)
    other = tiny.llava(layers=1, seed=1)
    with pytest.raises(CodebookError, match=r"built for some/model \(dimension 16\).*codebook build"):
        make(fingerprint=own).check(other)


def tensor(folder, **tensors):
    (folder / "prototypes.safetensors").write_bytes(save(tensors))
    reseal(folder)


def rows(folder, text):
    (folder / "provenance.jsonl").write_text(text)
    reseal(folder)


DAMAGE = {
    "flipped bit": (
        lambda f: (p := f / "prototypes.safetensors").write_bytes(p.read_bytes()[:-1] + b"!"), "is damaged",
    ),
    "truncated": (
        lambda f: (p := f / "prototypes.safetensors").write_bytes(p.read_bytes()[:-9]), "is damaged",
    ),
    "cut and resealed": (
        lambda f: ((p := f / "prototypes.safetensors").write_bytes(p.read_bytes()[:-9]), reseal(f)), "cannot read",
    ),
    "empty tensors": (
        lambda f: ((f / "prototypes.safetensors").write_bytes(b""), reseal(f)), "cannot read",
    ),
    "no tensors": (lambda f: (f / "prototypes.safetensors").unlink(), "no prototypes.safetensors"),
    "no provenance": (lambda f: (f / "provenance.jsonl").unlink(), "no provenance.jsonl"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "cannot read .*config.json"),
    "config of bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "cannot read .*config.json"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "is not a codebook's"),
    "another tool's config": (lambda f: (f / "config.json").write_text('{"model_type": "x"}'), "is not a codebook's"),
    "later format": (lambda f: reseal(f, format_version=2), "format version 2 and this package reads 1"),
    "config without model": (
        lambda f: (f / "config.json").write_text('{"format_version": 1}'), "model: Field required",
    ),
    "another dimension": (lambda f: reseal(f, dimension=17), r"config.json says \(50, 17\)"),
    "nan": (lambda f: tensor(f, prototypes=torch.full((50, 16), torch.nan)), "NaN"),
    "a row of zeros": (lambda f: tensor(f, prototypes=torch.eye(50, 16)), "prototype 16 points nowhere"),
    "a row without a length in float32": (
        lambda f: tensor(f, prototypes=torch.full((50, 16), 1e30)), "prototype 0 points nowhere",
    ),
    "half precision": (lambda f: tensor(f, prototypes=torch.zeros(50, 16).half()), "float32"),
    "one axis": (lambda f: tensor(f, prototypes=torch.zeros(800)), "float32"),
    "another name": (lambda f: tensor(f, weights=torch.zeros(50, 16)), "one tensor named prototypes"),
    "short provenance": (lambda f: rows(f, '{"cluster": 0}\n' * 49), "49 records for 50 prototypes"),
    "bad provenance": (lambda f: rows(f, "{\n" * 50), "cannot read .*provenance.jsonl"),
    "provenance of numbers": (lambda f: rows(f, "1\n" * 50), "line 1: .*should be an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folder(case, tmp_path):
    make().save(tmp_path)
    damage, message = DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(CodebookError, match=message) as caught:
        Codebook.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(CodebookError, match="no such folder"):
        Codebook.load(tmp_path / "none")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_an_error_and_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    make().save(folder)
    (folder / "prototypes.safetensors").write_bytes(data)
    reseal(folder)
    with pytest.raises(CodebookError):
        Codebook.load(folder)


def test_failed_save_leaves_the_old_codebook(tmp_path, monkeypatch):
    make().save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CodebookError, match="No space left on device; free space"):
        make(seed=5).save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_released_format(tmp_path):
    released = torch.randn(5, 8).half()
    torch.save(released.requires_grad_(), tmp_path / "b.pt")
    (tmp_path / "b.json").write_text('["1", "1", "2", "3", "4"]')
    book = Codebook.from_released(tmp_path / "b.pt", tmp_path / "b.json", model="m")
    assert torch.equal(book.prototypes, released.detach().float()) and book.config["model"] == "m"
    assert [row["image"] for row in book.provenance] == ["1", "1", "2", "3", "4"]
    book.save(tmp_path / "out")
    Codebook.load(tmp_path / "out")

    (tmp_path / "b.json").write_text('["1"]')
    with pytest.raises(CodebookError, match="1 records for 5 prototypes"):
        Codebook.from_released(tmp_path / "b.pt", tmp_path / "b.json")
    torch.save({"a": 1}, tmp_path / "b.pt")
    with pytest.raises(CodebookError, match="does not hold one tensor"):
        Codebook.from_released(tmp_path / "b.pt", tmp_path / "b.json")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_released_format_executes_nothing(tmp_path, capsys):
    torch.save(Evil(), tmp_path / "b.pt")
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(CodebookError, match="cannot read"):
        Codebook.from_released(tmp_path / "b.pt", tmp_path / "b.json")
    assert "executed" not in capsys.readouterr().out
