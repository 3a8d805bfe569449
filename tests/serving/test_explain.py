"""Explanations over HTTP: the kept tokens and answers of `ask`, and the prototypes that dropped patches are like."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.served import data_url
from benchmarks.served import sample_body as body
from codebook import Schedule
from codebook.analysis.explain import explain
from codebook.inference.ask import ask
from codebook.inference.overlay import overlay
from codebook.inference.prompts import Prompts
from codebook.miniature.samples import of_miniature
from codebook.pruning.methods.base import ScoringPruner
from codebook.pruning.stage import Stage
from codebook.serving.errors import ServiceError
from codebook.serving.explain import explain_job
from codebook.serving.limits import Limits
from codebook.serving.model_thread import Job
from codebook.serving.preparing import Preparer
from codebook.store.codebook import Codebook
from codebook.store.shipped import prebuilt
from tests.models.families import FAMILIES
from tests.serving.running import Service, wait


@pytest.fixture(scope="module")
def sample():
    return of_miniature("test", 0, 1, ["ocr"])[0]


@pytest.fixture
def asked(service, sample):
    def post(headers=None, **fields):
        return httpx.post(f"{service.url}/v1/explain", json=body(sample) | fields, headers=headers or {}, timeout=60)

    return post


def kept_by_ask(loaded, sample, schedule):
    model, processor, _ = loaded
    [answer] = ask(model, processor, [sample.pictures()], [sample.question], schedule)
    return answer


def test_the_services_schedule(asked, loaded, sample):
    model, processor, schedule = loaded
    found, expected, book = asked().json(), kept_by_ask(loaded, sample, schedule), prebuilt(model)
    assert found["answer"] == expected.text and found["schedule"] == str(schedule)
    assert found["grids"] == [{"kind": "view", "rows": 12, "cols": 12, "box": [0, 0, 1, 1]}]
    [stage] = found["stages"]
    assert stage == {"layer": 0, "stage": str(schedule), "kept": expected.kept}
    assert (found["codebook"]["prototypes"], found["codebook"]["model"]) == (len(book), "miniature")
    assert len(found["dropped"]) == 16 and not {12 * one["row"] + one["col"] for one in found["dropped"]} & {
        token for kept in stage["kept"] for token in kept
    }
    for one in found["dropped"][:3]:
        alone = explain(model, processor, book, sample.pictures()[0], (one["row"], one["col"]), 3)
        assert one["similarity"] == pytest.approx(alone.similarity, abs=1e-5) and one["rank"] == alone.rank
        assert [near["image"] for near in one["neighbours"]] == [near["image"] for near in alone.neighbours]
    similar = [one["similarity"] for one in found["dropped"]]
    assert similar == sorted(similar, reverse=True)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"method": "codebook"}, "codebook"),
        ({"method": "codebook", "keep": 0.5}, "codebook"),
        ({"keep": 36}, None),
        ({"keep": 1.0}, None),
        ({"method": "divprune", "keep": 0.25}, "divprune"),
        ({"method": "s2prune", "keep": 0.25}, "s2prune"),
    ],
)
def test_another_method_or_budget(asked, loaded, sample, fields, text):
    """With the service's own in the place of what is not said."""
    schedule = Schedule.for_model(loaded[0], text or "seeded", fields.get("keep", loaded[2].budget(144, 12)))
    found = asked(**fields, patches=2, neighbours=1).json()
    expected = kept_by_ask(loaded, sample, schedule)
    assert found["schedule"] == str(schedule)
    assert found["stages"][-1]["kept"] == expected.kept and found["answer"] == expected.text
    if text in ("divprune", "s2prune"):
        assert found["codebook"] is None and found["dropped"] is None
    else:
        assert [len(one["neighbours"]) for one in found["dropped"]] == ([] if fields.get("keep") == 1 else [1, 1])


def test_as_a_picture(asked, loaded, sample):
    answer = asked({"Accept": "image/png, */*;q=0.5"})
    assert answer.headers["content-type"] == "image/png"
    [kept] = kept_by_ask(loaded, sample, loaded[2]).kept
    expected = overlay(sample.pictures()[0], kept, (12, 12))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), np.asarray(expected))


def test_what_is_refused(asked, sample):
    long = Image.new("RGB", (3000, 20))
    turns = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(long)}},
                                          {"type": "text", "text": "read the number."}]}]  # fmt: skip
    text = [{"role": "user", "content": "read the number."}]
    for fields, status, words in [
        ({"messages": text}, 422, "0 images"),
        ({"messages": turns * 2}, 422, "2 images"),
        ({"method": "sorcery"}, 422, "no method 'sorcery'"),
        ({"method": "codebook:0.2,random@3:0.1"}, 422, "method"),
        ({"method": "/etc/passwd.json"}, 422, "method"),
        ({"keep": 1.5}, 422, "keep must be"),
        ({"keep": "0.5"}, 422, "keep"),
        ({"patches": 101}, 422, "patches"),
        ({"neighbours": 0}, 422, "neighbours"),
        ({"stream": True}, 422, "stream"),
        ({"model": "other"}, 404, "miniature"),
    ]:
        answer = asked(**fields)
        assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text
    answer = asked({"Accept": "image/png"}, messages=turns)
    assert answer.status_code == 422 and "too long to be drawn" in answer.json()["error"]["message"]


def test_the_time_counts_from_the_acceptance(loaded, sample, monkeypatch):
    """Also while the thread is not free that reads the request: here a first one has it for longer than the limit."""
    stock, release, seen = Preparer.prepare, threading.Event(), []

    def slow(*given):
        seen.append(given)
        release.wait(30)
        return stock(*given)

    monkeypatch.setattr(Preparer, "prepare", slow)
    running = Service(*loaded, limits=Limits(seconds=1))
    try:
        with ThreadPoolExecutor(2) as clients:
            asked = [
                clients.submit(httpx.post, f"{running.url}/v1/explain", json=body(sample), timeout=60) for _ in range(2)
            ]
            wait(lambda: seen and running.state.active == 2)
            time.sleep(1.1)
            release.set()
            assert [one.result().status_code for one in asked] == [503, 503]
    finally:
        running.stop()


class Spy(ScoringPruner):
    """Keeps the first tokens, and writes down what it saw."""

    def __init__(self):
        self.seen = []

    def score(self, tokens):
        self.seen.append((tokens.features, tokens.grid))
        return -tokens.ordinal.float()


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "idefics3", "granite4_vision"])
def test_patches_of_every_grid_are_those_that_pruners_see(name):
    """Images of crops, of any size, and with structural tokens between; the similarities are of the decoder's input."""
    family, spy = FAMILIES[name], Spy()
    inputs = family.inputs([[1, "image", 2, 3]])
    model = family.make()
    width = model.get_decoder().config.hidden_size
    book = Codebook(torch.randn(9, width, generator=torch.Generator().manual_seed(0)))
    job = Job(Prompts(inputs, [1]), 1, time.monotonic() + 60)
    with ThreadPoolExecutor(1) as other:  # whose hooks stand there already
        beside = Schedule([])(model, "thread")
        other.submit(beside.__enter__).result()
        found = explain_job(model, job, Schedule([Stage(0, 0.5, spy)]), book, 100, 2)
        other.submit(beside.__exit__, None).result()
    grids = found.image.layout.grids
    assert [grid for _, grid in spy.seen] == [(grid.rows, grid.cols) for grid in grids]
    assert len(found.dropped) == found.image.count - len(found.kept)
    for one in found.dropped:
        features, (_, cols) = spy.seen[one["grid"]]
        token = one["row"] * cols + one["col"]
        assert one["similarity"] == pytest.approx(float(book.redundancy(features[token][None])), abs=1e-5)
        assert token >= features.shape[0] // 2


def test_a_job_whose_time_is_over_is_not_begun():
    with pytest.raises(ServiceError, match="time limit"):
        explain_job(None, Job(None, 1, time.monotonic() - 1), Schedule([]), None, 1, 1)
