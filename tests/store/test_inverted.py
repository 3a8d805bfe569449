import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from codebook.building.clustering import dpc_knn
from codebook.store import inverted, search
from codebook.store.codebook import Codebook

faiss = pytest.importorskip("faiss")
N, D, CLUSTERS = 3000, 24, 40
SCRIPT = """
import sys, numpy as np, faiss
from pathlib import Path
from codebook.store import inverted
from codebook.store.inverted import Place, inverted_file
inverted.MEASURED, inverted.LISTS_PER_SEARCHED = 1000, 4
vectors = np.load(sys.argv[1])
index = inverted_file(faiss, lambda: print("made") or vectors, Place(Path(sys.argv[2]), "0" * 64))
print(index.nprobe, index.search(vectors[:20], 1)[1][:, 0].tolist())
"""


def clustered(n, seed):
    """Points around the same centres for every seed."""
    centres = 3 * torch.randn(CLUSTERS, D, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    return centres[torch.randint(CLUSTERS, (n,), generator=generator)] + torch.randn(n, D, generator=generator)


def images(seed):
    """Four images of 144 tokens: half are further members of the clusters, half lie between two of them."""
    near, a, b = (clustered(288, 3 * seed + i) for i in range(1, 4))
    return torch.cat([near.reshape(4, 72, D), ((a + b) / 2).reshape(4, 72, D)], dim=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a codebook that is large enough for an index, and a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(search, "FAISS_FROM", 1000)
    monkeypatch.setattr(inverted, "MEASURED", 1000)
    monkeypatch.setattr(inverted, "LISTS_PER_SEARCHED", 4)  # lists are few in a small codebook
    Codebook(clustered(N, 99)).save(tmp_path / "book")
    return tmp_path / "book"


@pytest.fixture
def made(monkeypatch):
    """How many lists each index has that is made from now on."""
    lists, measured = [], inverted.measured_index

    def spy(*given):
        index, agreement = measured(*given)
        lists.append(index.nlist)
        return index, agreement

    monkeypatch.setattr(inverted, "measured_index", spy)
    return lists


def record(folder):
    [path] = (folder.parent / "caches" / "codebook").glob("*.json")
    return path, json.loads(path.read_text())


def agrees(book, tokens):
    """The share of keep decisions, at the worst keep ratio, that are those of a product with all prototypes."""
    found = book.redundancy(tokens)
    unit, prototypes = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (tokens, book.prototypes))
    exact = (unit @ prototypes.T).amax(dim=-1).float()
    assert (found <= exact + 1e-5).all()
    shares = []
    for keep in (14, 36, 72, 108, 130):
        kept = [s.argsort(dim=1).argsort(dim=1) < keep for s in (found, exact)]
        shares.append((kept[0] == kept[1]).float().mean().item())
    return min(shares)


def test_keep_decisions_are_those_of_the_exact_search(folder, made, caplog):
    with caplog.at_level(logging.WARNING):
        assert agrees(Codebook.load(folder), images(1)) >= 0.999
    assert "making a search index of 3,000 prototypes" in caplog.text and made == [int(4 * N**0.5)]
    path, known = record(folder)
    assert known["agreement"] >= 0.999 and 1 <= known["searched"] <= known["lists"] // 4 and known["lists"] == made[0]
    config = json.loads((folder / "config.json").read_text())
    assert path.stem == f"{config['sha256']['prototypes.safetensors']}-faiss-{faiss.__version__}"

    again = Codebook.load(folder)
    assert agrees(again, images(2)) >= 0.999 and len(made) == 1
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(folder / "prototypes.faiss") in maps.read_text()  # not copied
    assert torch.equal(again.search(images(3)[0])[1], again.search(images(3)[0], backend="torch")[1])
    assert len(again.redundancy(torch.empty(0, D))) == 0


def flipped(data):
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def test_a_damaged_index_is_made_again(folder, made):
    Codebook.load(folder).redundancy(images(1))
    index = folder / "prototypes.faiss"
    whole = index.read_bytes()
    for spoiled in (flipped(whole), whole[:5000], b"", None):
        index.unlink()
        if spoiled is not None:
            index.write_bytes(spoiled)
        assert agrees(Codebook.load(folder), images(1)) >= 0.999
        assert index.read_bytes() == whole
    assert len(made) == 5


def test_a_foreign_index_is_never_parsed(folder, made, monkeypatch):
    stranger = faiss.index_factory(D, "Flat", faiss.METRIC_INNER_PRODUCT)
    stranger.add(clustered(N, 5).numpy())
    faiss.write_index(stranger, str(folder / "prototypes.faiss"))
    strange, parsed, read = (folder / "prototypes.faiss").read_bytes(), [], faiss.read_index

    def spy(path, flags):
        parsed.append(Path(path).read_bytes())
        return read(path, flags)

    monkeypatch.setattr(faiss, "read_index", spy)
    assert agrees(Codebook.load(folder), images(1)) >= 0.999
    assert len(made) == len(parsed) == 1 and strange not in parsed

    path, known = record(folder)
    path.write_text(json.dumps(known | {"searched": "3"}))  # a record of another shape is no record
    assert agrees(Codebook.load(folder), images(1)) >= 0.999 and len(made) == 2

    Codebook(clustered(N, 98)).save(folder)  # other prototypes, beside the index of the old ones
    assert agrees(Codebook.load(folder), images(1)) >= 0.999 and len(made) == 3


def test_what_cannot_be_replaced_or_written_goes_to_the_users_cache(folder, made, monkeypatch):
    elsewhere = folder.parent / "elsewhere"
    elsewhere.write_bytes(b"precious")
    (folder / "prototypes.faiss").symlink_to(elsewhere)
    assert agrees(Codebook.load(folder), images(1)) >= 0.999
    assert elsewhere.read_bytes() == b"precious"
    [index] = (folder.parent / "caches" / "codebook").glob("*.faiss")
    assert agrees(Codebook.load(folder), images(1)) >= 0.999 and len(made) == 1

    (folder / "prototypes.faiss").unlink()
    index.unlink()
    replacing = inverted.replacing

    def read_only(path):
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        return replacing(path)

    monkeypatch.setattr(inverted, "replacing", read_only)
    assert agrees(Codebook.load(folder), images(1)) >= 0.999 and len(made) == 2
    assert index.exists() and not (folder / "prototypes.faiss").exists()


def test_without_a_place_the_search_is_exact(folder, made, monkeypatch):
    Codebook(clustered(N, 99)).redundancy(images(1))  # of no folder
    (folder.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "file"))  # nothing can be written below it
    assert agrees(Codebook.load(folder), images(1)) == 1
    assert not made and not (folder / "prototypes.faiss").exists()


def test_prototypes_without_clusters_are_searched_exactly(folder, made, monkeypatch):
    monkeypatch.setattr(inverted, "LISTS_PER_SEARCHED", 32)
    Codebook(torch.randn(N, D, generator=torch.Generator().manual_seed(0))).save(folder)
    for _ in range(2):
        assert agrees(Codebook.load(folder), images(1)) == 1
    assert len(made) == 1 and record(folder)[1]["searched"] == 0 and not (folder / "prototypes.faiss").exists()


def test_two_processes_make_one_index(tmp_path):
    import numpy as np

    vectors = torch.nn.functional.normalize(clustered(N, 99), dim=1).numpy()
    np.save(tmp_path / "vectors.npy", vectors)
    (tmp_path / "book").mkdir()
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, tmp_path / "vectors.npy", tmp_path / "book"]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = sorted("".join(process.communicate()[0]).splitlines(keepends=True) for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert sum(line == "made\n" for lines in answers for line in lines) == 1
    assert answers[0][-1] == answers[1][-1] and answers[0][-1].endswith(f" {list(range(20))}\n")
    assert [path.name for path in (tmp_path / "book").iterdir()] == ["prototypes.faiss"]


def on_gpu(monkeypatch, count):
    """FAISS as it is with GPUs, whose work the CPU does; what is asked of them is listed."""
    asked = []

    class Flat:
        def __init__(self, resources, d):
            asked.append("index")
            self.index = faiss.IndexFlatIP(d)
            self.add, self.search = self.index.add, self.index.search

    def knn_gpu(resources, *given):
        asked.append("knn")
        return faiss.knn(*given)

    def kmeans(*given, gpu, **more):
        asked.extend(["kmeans"] * gpu)
        return faiss.Kmeans(*given, **more)

    gpu = {"StandardGpuResources": object, "get_num_gpus": lambda: count, "GpuIndexFlatIP": Flat, "knn_gpu": knn_gpu}
    stub = SimpleNamespace(**(vars(faiss) | gpu | {"Kmeans": kmeans}))
    monkeypatch.setitem(sys.modules, "faiss", stub)
    return asked


@pytest.mark.parametrize("count", [0, 1])
def test_a_gpu_gives_the_same_answers(folder, made, monkeypatch, count):
    book, x = Codebook.load(folder), images(1)
    exact, (similarity, index) = book.search(x[0], 1, "torch")[0][:, 0], book.search(x[0], 3, "torch")
    labels = dpc_knn(clustered(1000, 1), 8, exact=0)
    asked = on_gpu(monkeypatch, count)
    if count:
        torch.testing.assert_close(book.redundancy(x[0]), exact)
        assert not made  # a GPU compares with all prototypes
    found = book.search(x[0], 3, "faiss")
    torch.testing.assert_close(found[0], similarity)
    assert torch.equal(found[1], index)
    assert torch.equal(dpc_knn(clustered(1000, 1), 8, exact=0), labels)
    assert set(asked) == ({"index", "knn", "kmeans"} if count else set())
