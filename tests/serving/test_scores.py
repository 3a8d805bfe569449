"""Scores over HTTP: the library's to the last bit, or a refusal that says why."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from starlette.testclient import TestClient

from codebook import RedundancyCodebook, SeededFarthestPoint, VisualTokens
from codebook.errors import CodebookError
from codebook.pruning.presets import DEFAULT, KEEP
from codebook.serving.app import build_app
from codebook.serving.limits import Limits
from codebook.serving.metrics import Metrics
from codebook.serving.scores import SCORED_AT_ONCE
from codebook.serving.shelf import Shelf, named_folders
from codebook.serving.state import State
from codebook.serving.wire import Malformed, Misfit, check_features
from tests.serving.bodies import hostile, one, raw
from tests.store.books import make, tokens

SCORE = "/v1/codebooks/small/score"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    book = make(fingerprint=None)
    folder = tmp_path_factory.mktemp("books") / "small"
    book.save(folder)
    return folder


@pytest.fixture(scope="module")
def state(folder):
    return State(shelf=Shelf({"small": folder}), metrics=Metrics())


@pytest.fixture(scope="module")
def client(state):
    return TestClient(build_app(state))


@pytest.fixture
def sentence(client):
    """The error of a request that must be refused with this status."""

    def ask(status, body, address=SCORE):
        answer = client.post(address, content=body)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) <= 600 and error["message"].isprintable()
        return error["message"]

    return ask


PRUNERS = {"codebook": RedundancyCodebook, "seeded": SeededFarthestPoint}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("method", "keep", "count"),
    [("codebook", "0.2", 8), ("seeded", "0.2", 8), ("seeded", "13", 13), ("codebook", "1", 1), ("codebook", "1.0", 40)],
)
def test_scores_are_the_librarys(client, dtype, method, keep, count):
    """To the last bit, for one image and for several, which are scored as if each were alone."""
    features, book = torch.stack([tokens(seed=seed) for seed in (1, 2, 3)]).to(dtype), make()
    address = f"{SCORE}?keep={keep}&method={method}"
    several = load(client.post(address, content=save({"features": features})).content)
    for i, image in enumerate(features):
        found = load(client.post(address, content=save({"features": image})).content)
        redundancy, kept = book.redundancy(image), PRUNERS[method](book).select(VisualTokens.of(image), count)
        assert found["redundancy"].dtype == torch.float32 and torch.equal(found["redundancy"], redundancy)
        assert found["kept"].dtype == torch.int64 and torch.equal(found["kept"], kept) and len(kept) == count
        assert all(torch.equal(several[name][i], found[name]) for name in ("redundancy", "kept"))


def test_scores_by_hand(client):
    """The least redundant of cosines in double precision, without the library."""
    features, prototypes = tokens().double(), make().prototypes.double()
    cosine = (features / features.norm(dim=1, keepdim=True)) @ (prototypes / prototypes.norm(dim=1, keepdim=True)).T
    body = save({"features": features.float()})
    found = load(client.post(f"{SCORE}?keep=0.25&method=codebook", content=body).content)
    torch.testing.assert_close(found["redundancy"].double(), cosine.amax(1), rtol=0, atol=1e-6)
    assert found["kept"].tolist() == sorted(cosine.amax(1).argsort()[:10].tolist())


def test_without_options_the_command_lines_defaults_hold(client):
    body = save({"features": tokens()})
    plain, full = (client.post(SCORE + query, content=body) for query in ("", f"?keep={KEEP}&method={DEFAULT}"))
    assert plain.status_code == 200 and plain.content == full.content


def test_zeros_are_like_nothing(client):
    found = load(client.post(SCORE, content=one("F16", [5, 16], 160)).content)
    assert found["redundancy"].tolist() == [0] * 5


@pytest.mark.parametrize("name", hostile())
def test_hostile_bodies(sentence, name):
    status, words, body = hostile()[name]
    assert words in sentence(status, body)


def test_every_cut_and_every_changed_byte_is_scored_or_refused(client):
    """The header's bytes one by one, of the smallest body; never an error of the service's own."""
    body = one("F16", [1, 16], 32)
    header = len(body) - 32
    for i in range(header):
        for changed in (body[:i], body[:i] + bytes([body[i] ^ 0x15]) + body[i + 1 :]):
            try:
                check_features(changed, 16)
            except (Malformed, Misfit) as error:
                assert len(str(error)) < 600
                continue
            assert client.post(SCORE, content=changed).status_code in (200, 400)


@pytest.mark.parametrize(("query", "words"), [
    ("keep=0", "keep must be"), ("keep=1.5", "keep must be"), ("keep=-1", "-1"), ("keep=nan", "keep must be"),
    ("keep=half", "decimal point"), ("keep=0.2,random@3:0.1", "decimal point"), ("keep=41", "cannot keep 41"),
    ("keep=" + "9" * 5000, "decimal point"), ("method=random", "seeded"), ("method=fastv@3", "seeded"),
    ("kep=0.2", "kep"), ("keep=0.2&keep=0.5", "twice"),
])  # fmt: skip
def test_wrong_options(sentence, query, words):
    assert words in sentence(422, save({"features": tokens()}), f"{SCORE}?{query}")


def test_an_unknown_name_is_told_those_there_are(sentence, folder):
    body = save({"features": tokens()})
    assert "this service has small" in sentence(404, body, "/v1/codebooks/large/score")
    for name in ("..%2f..%2fetc", "%00", "a" * 3000, "small%0Ax"):
        sentence(404, body, f"/v1/codebooks/{name}/score")
    many = Shelf({f"book-{i:02}": folder for i in range(30)})
    assert many.names().startswith("book-00, book-01") and many.names().endswith("book-09 and 20 more")


def test_the_listing(client, folder):
    config = json.loads((folder / "config.json").read_text())
    assert client.get("/v1/codebooks").json() == {
        "object": "list",
        "data": [{
            "name": "small", "model": "some/model", "dimension": 16, "prototypes": 50, "fingerprint": None,
            "sha256": config["sha256"]["prototypes.safetensors"],
        }],
    }  # fmt: skip


def test_seconds_are_counted_under_the_books_name(client, state):
    def count():
        return state.metrics.registry.get_sample_value("codebook_score_seconds_count", {"codebook": "small"})

    client.post(SCORE, content=save({"features": tokens()}))
    before = count()
    client.post(SCORE, content=save({"features": tokens()}))
    client.post(SCORE, content=raw({}))
    client.post("/v1/codebooks/other/score", content=save({"features": tokens()}))
    assert count() == before + 1


def test_what_waits_too_long_is_refused(folder):
    """One more is asked than are scored at once, and those take longer than the limit."""
    shelf, over = Shelf({"small": folder}), threading.Event()
    book = shelf.find("small")
    redundancy = book.redundancy
    book.redundancy = lambda tokens: redundancy(tokens) if over.wait(30) else None
    state = State(shelf=shelf, metrics=Metrics(), limits=Limits(seconds=1))
    body, statuses = save({"features": tokens()}), []
    with TestClient(build_app(state)) as client, ThreadPoolExecutor(SCORED_AT_ONCE + 1) as pool:
        asked = [pool.submit(client.post, SCORE, content=body) for _ in range(SCORED_AT_ONCE + 1)]
        for future in as_completed(asked):
            statuses.append(future.result().status_code)
            over.set()
    assert statuses == [503] + [200] * SCORED_AT_ONCE


def test_a_shelf_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    make(seed=0).save(tmp_path / "a")
    make(seed=1).save(tmp_path / "b")
    shelf = Shelf({"a": tmp_path / "a", "b": tmp_path / "b"})
    old = shelf.find("a"), shelf.find("b")
    make(seed=2).save(tmp_path / "a")
    (tmp_path / "b" / "prototypes.safetensors").write_bytes(b"damaged")
    with pytest.raises(CodebookError, match="prototypes"):
        shelf.reload()
    assert (shelf.find("a"), shelf.find("b")) == old
    make(seed=3).save(tmp_path / "b")
    shelf.reload()
    assert torch.equal(shelf.find("a").prototypes, make(seed=2).prototypes)
    assert torch.equal(shelf.find("b").prototypes, make(seed=3).prototypes)


def test_names_of_folders(tmp_path):
    found, unnamed = named_folders(["x=some/folder", "y=miniature", "miniature", "./a=b", str(tmp_path / "é à")])
    shipped = Path("miniature")
    assert found == {"x": Path("some/folder"), "y": shipped, "miniature": shipped, "a-b": Path("./a=b"),
                     "codebook": tmp_path / "é à"}  # fmt: skip
    assert unnamed == [shipped, Path("./a=b"), tmp_path / "é à"]
    assert len(Shelf({"y": shipped}).find("y")) == 469
    for given in (["x=a", "x=b"], ["=a"], ["a" * 65 + "=b"], ["x y=a"], ["x", "./x"], ["..=a"], ["x\n=a"]):
        with pytest.raises(CodebookError):
            named_folders(given)
