"""Requests that are refused, and what goes on meanwhile: the short version of `benchmarks/faults/serve_hostile.py`."""

import contextlib
import json
import socket

import httpx
import pytest

from benchmarks.faults import serve_hostile
from benchmarks.served import data_url, post, sample_body
from codebook.miniature.samples import of_miniature
from codebook.serving import protocol
from codebook.serving.limits import Limits
from tests.serving.running import Service


@pytest.fixture(scope="module")
def service(loaded):
    running = Service(*loaded, limits=Limits(**serve_hostile.LIMITS | {"upload_seconds": 1}), local=True)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def target(service):
    made = serve_hostile.make_target(service.url)
    yield made
    made.client.close()


def test_hostile_requests_are_refused_and_the_service_answers_right_after(target):
    found = list(serve_hostile.hostile(target, len(serve_hostile.ATTACKS), seed=1))
    assert {name for name, _ in found} == set(serve_hostile.ATTACKS)
    assert not [(name, fault) for name, fault in found if fault]


def test_a_wrong_answer_and_another_shape_would_be_found(target, monkeypatch):
    """That the check above can fail."""
    monkeypatch.setattr(target, "expected", target.expected.__class__(200, "another answer"))
    [(_, fault)] = serve_hostile.hostile(target, 1)
    assert "afterwards" in fault
    assert not serve_hostile.has_shape(b"Internal Server Error")
    assert not serve_hostile.has_shape(b'{"error": {"message": "", "type": "a", "param": null, "code": null}}')


def refusal(service, **changes):
    """(status, code, param, message) of the refusal of a good request with these fields changed."""
    [sample] = of_miniature("test", 0, 1, ["ocr"])
    response = httpx.post(f"{service.url}/v1/chat/completions", json=sample_body(sample) | changes)
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"], error["message"]


@pytest.mark.parametrize(
    ("changes", "status", "code", "words"),
    [
        ({"model": "other"}, 404, "model_not_found", "there is no such model here: the model is 'miniature'"),
        ({"max_tokens": 65}, 422, None, "max_tokens is 65, and an answer has at most 64"),
        ({"generation_config": "{}"}, 422, None, "generation_config: Extra inputs are not permitted"),
        ({"temperature": 0.001}, 422, None, "temperature: Value error, must be 0, which is greedy, or at least 0.01"),
        ({"messages": []}, 422, None, "messages: List should have at least 1 item after validation, not 0"),
    ],
)
def test_refusals_say_what_is_wrong(service, changes, status, code, words):
    [field] = changes
    assert refusal(service, **changes) == (status, code, field, words)


def test_a_word_that_the_model_does_not_know_is_named(service):
    status, _, param, message = refusal(service, messages=[{"role": "user", "content": "what is the weather?"}])
    assert (status, param) == (422, "messages") and "does not know 'weather'" in message


def test_an_empty_text_is_refused_and_a_picture_alone_is_not(service):
    [sample] = of_miniature("test", 0, 1, ["ocr"])
    [turn] = sample_body(sample)["messages"]
    picture = [part for part in turn["content"] if part["type"] == "image_url"]
    for content in ("", " ", [*picture, {"type": "text", "text": "\n"}]):
        status, _, param, message = refusal(service, messages=[{"role": "user", "content": content}])
        assert (status, param) == (422, "messages") and message.startswith("the question is empty: write one")
    alone = {"messages": [{"role": "user", "content": picture}], "max_tokens": 2}
    assert httpx.post(f"{service.url}/v1/chat/completions", json=alone).status_code == 200


def test_images_and_pixels_are_limited(loaded):
    [sample] = of_miniature("test", 0, 1, ["ocr"])
    [picture] = sample.pictures()
    url = {"type": "image_url", "image_url": {"url": data_url(picture)}}
    running = Service(*loaded, limits=Limits(images=2, pixels=picture.width * picture.height))
    try:
        content = [url, url, {"type": "text", "text": sample.question}]
        status, code, _, message = refusal(running, messages=[{"role": "user", "content": content}])
        assert (status, code) == (422, "invalid_image") and message.startswith("image 2: ") and "pixels" in message
        status, code, *_ = refusal(running, messages=[{"role": "user", "content": [url, *content]}])
        assert (status, code) == (422, "invalid_image")  # the pixels of the second come before the third is counted
    finally:
        running.stop()


def test_an_api_key_is_asked_for(loaded):
    running = Service(*loaded, api_key="secret-Schlüssel")
    try:
        with httpx.Client(base_url=running.url) as client:
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
            for given in ("", "Bearer", "Bearer secret", "secret"):
                refused = client.get("/v1/models", headers={"Authorization": given})
                assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
            header = {"Authorization": "Bearer secret-Schlüssel".encode()}
            assert client.get("/v1/models", headers=header).json()["data"][0]["id"] == "miniature"
            assert client.get("/metrics").status_code == 401
    finally:
        running.stop()


def test_a_full_queue_refuses_and_draining_refuses(loaded):
    running = Service(*loaded, limits=Limits(queue=1))
    [sample] = of_miniature("test", 0, 1, ["ocr"])
    body = json.dumps(sample_body(sample)).encode()
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            running.state.active += 1  # as of a request that is being answered
            full = client.post("/v1/chat/completions", content=body)
            assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full"
            assert full.headers["retry-after"] == "1"
            running.state.active -= 1
            assert post(client, body).status == 200
            running.state.draining = True
            for path in ("/ready", "/v1/models"):
                refused = client.get(path)
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            assert client.get("/health").status_code == client.get("/metrics").status_code == 200
            assert client.post("/v1/chat/completions", content=body).status_code == 503
    finally:
        running.stop()


def test_connections_are_limited(service, target, monkeypatch):
    monkeypatch.setattr(protocol, "MOST_CONNECTIONS", len(service.server.server_state.connections) + 1)
    with (
        socket.create_connection(target.place),
        socket.create_connection(target.place, timeout=30) as further,
        contextlib.suppress(ConnectionError),
    ):
        assert not further.recv(1)
    monkeypatch.undo()
    assert httpx.get(f"{service.url}/health").status_code == 200
