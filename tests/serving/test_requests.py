"""Requests that are refused, and what goes on meanwhile: the short version of `benchmarks/faults/serve_hostile.py`."""

import contextlib
import copy
import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from benchmarks.faults import serve_hostile
from benchmarks.served import data_url, post, sample_body
from codebook.miniature.samples import of_miniature
from codebook.serving import chat, protocol
from codebook.serving.errors import ServiceError
from codebook.serving.limits import Limits
from codebook.serving.model_thread import ModelThread
from codebook.serving.preparing import Preparer
from codebook.serving.request import ChatRequest
from tests.serving.running import Service, wait


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
        ({"generation_config": "{}"}, 422, None, "generation_config: is not understood here: leave it out"),
        (
            {"response_format": {"type": "json_object"}},
            422,
            None,
            "response_format: is not understood here: leave it out",
        ),
        ({"parallel_tool_calls": 1}, 422, None, "parallel_tool_calls: is not understood here: leave it out"),
        ({"stop": ["."]}, 422, None, "stop: is not understood here: leave it out"),
        ({"temperature": 0.001}, 422, None, "temperature: must be 0, which is greedy, or at least 0.01"),
        ({"messages": []}, 422, None, "messages: List should have at least 1 item after validation, not 0"),
        ({"top_p": 0.5}, 422, None, "top_p: answers without a temperature are greedy: give one too"),
        (
            {"stream_options": {"include_usage": True}},
            422,
            None,
            "stream_options: only for streams: leave it out, or ask for one",
        ),
        ({"max_completion_tokens": 65}, 422, None, "max_completion_tokens is 65, and an answer has at most 64"),
        *(
            ({field: value}, 422, None, f"{field}: is not understood here: leave it out")
            for field, values in {
                "n": (2, True, 1.0, "1"),
                "frequency_penalty": (0.1, False),
                "presence_penalty": (-2, "0"),
                "logprobs": (True, 0),
                "store": (True, ""),
                "tools": ([{}], {}),
                "top_logprobs": (1, False),
                "metadata": ([], "a"),
                "safety_identifier": (1, ["a"]),
                "prompt_cache_key": (True,),
                "reasoning_effort": ("high",),
            }.items()
            for value in values
        ),
    ],
)
def test_refusals_say_what_is_wrong(service, changes, status, code, words):
    [field] = changes
    assert refusal(service, **changes) == (status, code, field, words)


@pytest.mark.parametrize(
    ("first", "param", "words"),
    [
        ({"name": "bob"}, "messages.0.name", "is not understood here: leave it out"),
        ({"role": "tool"}, "messages.0.role", "Input should be 'system', 'user' or 'assistant'"),
        ({"content": []}, "messages", "the question is empty: write one"),
        (
            {"content": [{"type": "input_audio", "input_audio": {}}]},
            "messages.0.content.0",
            "'input_audio' found using 'type' does not match any of the expected tags: 'text', 'image_url'",
        ),
        (
            {"content": [{"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}]},
            "messages.0.content.0.image_url.image_url.detail",
            "is not understood here: leave it out",
        ),
    ],
)
def test_what_a_message_would_not_be_shown_with_is_refused(service, first, param, words):
    status, _, found, message = refusal(service, messages=[{"role": "user", "content": "yes"} | first])
    assert (status, found) == (422, param) and words in message


def test_two_lengths_that_differ_are_refused(service):
    status, _, param, message = refusal(service, max_tokens=3, max_completion_tokens=4)
    assert (status, param) == (422, "max_completion_tokens") and "another name of max_tokens" in message


def test_the_last_message_asks_something(service):
    [turn] = sample_body(of_miniature("test", 0, 1, ["ocr"])[0])["messages"]
    for content in ("", " ", [], [{"type": "text", "text": ""}]):
        status, _, param, message = refusal(service, messages=[turn, {"role": "user", "content": content}])
        assert (status, param) == (422, "messages") and message.startswith("the question is empty")


@pytest.mark.parametrize("path", ["chat/completions", "compare", "explain", "codebooks", "models"])
def test_options_in_an_address_that_has_none_are_refused(service, path):
    ask = "GET" if path in ("codebooks", "models") else "POST"
    refused = httpx.request(ask, f"{service.url}/v1/{path}?keep=0.5", json={})
    assert refused.status_code == 422 and refused.json()["error"]["param"] == "keep"


def test_what_is_said_twice_is_refused(service):
    good = json.dumps(sample_body(of_miniature("test", 0, 1, ["ocr"])[0]))
    for twice in (
        good[:-1] + ', "max_tokens": 2, "max_tokens": 3}',
        good.replace('"role"', '"role": "system", "role"'),
    ):
        refused = httpx.post(f"{service.url}/v1/chat/completions", content=twice)
        assert refused.status_code == 422 and "is given twice" in refused.json()["error"]["message"]


def test_headers_that_cannot_be_meant(service):
    """Hosts and origins that are no addresses are others' than this machine; an encoded body is not read as it is."""
    for headers in ({"Host": "[::1"}, {"Host": "[::1]x"}, {"Host": "localhost:8000x"}, {"Origin": "http://[::1"}):
        assert httpx.get(f"{service.url}/health", headers=headers).status_code == 403
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:", "127.0.0.2:80", "[::1]:8000"):
        assert httpx.head(f"{service.url}/health", headers={"Host": host}).status_code == 200
    encoded = httpx.post(f"{service.url}/v1/explain", content=b"{}", headers={"Content-Encoding": "gzip"})
    assert encoded.status_code == 415 and "as by gzip" in encoded.json()["error"]["message"]


def exchange(target, text):
    """(status, body) of the answer to a request that is written out, but for its end."""
    return target.raw(f"{text}\r\nConnection: close\r\n\r\n".encode())


def test_a_target_may_be_a_whole_address(service, target):
    """RFC 9112, 3.2.2: every server must take it, and the host in it is the one that counts."""
    for url in (service.url, "HTTP://localhost"):
        assert exchange(target, f"GET {url}/health HTTP/1.1\r\nHost: evil.example")[0] == 200
    status, body = exchange(target, f"GET {service.url}/v1/models?keep=1 HTTP/1.1\r\nHost: localhost")
    assert status == 422 and b"keep" in body
    assert exchange(target, f"GET {service.url} HTTP/1.1\r\nHost: localhost")[0] == 200  # the page
    for url in ("http://evil.example/health", "http://localhost@evil.example/health"):
        assert exchange(target, f"GET {url} HTTP/1.1\r\nHost: localhost")[0] == 403
    assert exchange(target, "GET file://localhost/health HTTP/1.1\r\nHost: localhost")[0] == 404


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/codebooks/any/score", "/v1/codebooks/{name}/score"),
        ("/v1/none", "other"),
    ],
)
def test_what_is_refused_counts_for_its_endpoint(service, path, endpoint):
    """Whatever refuses it, and before it is known which part of the service was asked."""
    labels, read = {"endpoint": endpoint, "status": "413"}, service.state.metrics.registry.get_sample_value
    before = read("codebook_requests_total", labels) or 0
    assert httpx.post(service.url + path, content=bytes(service.state.limits.body + 1)).status_code == 413
    wait(lambda: read("codebook_requests_total", labels) == before + 1)  # once the answer is sent


def test_a_client_that_leaves_before_it_has_asked_is_counted_as_one(service, target):
    labels = {"endpoint": "/v1/chat/completions", "status": "499"}
    read = service.state.metrics.registry.get_sample_value
    before = read("codebook_requests_total", labels) or 0
    with socket.create_connection(target.place) as connection:
        connection.sendall(serve_hostile.request_head(100) + b"{")
    wait(lambda: read("codebook_requests_total", labels) == before + 1)


def test_a_client_cannot_write_to_the_log(service, target, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    for text in ("nonsense", "GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: Upgrade"):
        target.raw(f"{text}\r\n\r\n".encode(), lambda connection: connection.shutdown(socket.SHUT_WR))
    assert caplog.records == []


def test_a_service_whose_model_has_failed_is_neither_well_nor_ready(service, monkeypatch):
    monkeypatch.setattr(service.state.model_thread, "_device_failed", True)
    for path in ("/health", "/ready"):
        answer = httpx.get(service.url + path)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "broken"


def test_a_wrong_address_or_method_says_what_there_is(service):
    refused = httpx.post(f"{service.url}/v1/embeddings", json={})
    assert refused.status_code == 404 and "POST '/v1/embeddings'; see docs/serving.md" in refused.text
    refused = httpx.post(f"{service.url}/v1/chat/completions/", json={})
    assert refused.status_code == 404 and "see docs/serving.md" in refused.text  # a redirection could leave https
    refused = httpx.put(f"{service.url}/v1/chat/completions", json={})
    assert refused.status_code == 405 and "PUT '/v1/chat/completions'; ask by POST" in refused.text


def test_an_error_that_nobody_expected_is_counted_as_one(service, monkeypatch):
    def failing(*_, **__):
        raise KeyError("detail")

    monkeypatch.setattr(chat, "parse_request", failing)
    labels = {"endpoint": "/v1/chat/completions", "status": "500"}
    answer = httpx.post(f"{service.url}/v1/chat/completions", json={})
    assert answer.status_code == 500 and answer.json()["error"]["message"].startswith("unexpected KeyError")
    wait(lambda: service.state.metrics.registry.get_sample_value("codebook_requests_total", labels) == 1)  # once sent


def test_a_client_that_does_not_read_is_cut_off(service, target):
    """Of more answers than the network holds."""
    connections = service.server.server_state.connections
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(target.place)
        deaf.settimeout(30)
        with contextlib.suppress(ConnectionError):
            for _ in range(300):
                deaf.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        port = deaf.getsockname()[1]
        wait(lambda: port not in [connection.client[1] for connection in list(connections)])


def test_a_client_that_reads_slowly_is_waited_for():
    """As long as something of an answer goes out in every span of time."""
    waits, left = [], iter([100, 60, 20, 20])
    made = protocol.LimitedProtocol.__new__(protocol.LimitedProtocol)
    made.flow = SimpleNamespace(pause_writing=lambda: None, resume_writing=lambda: None)
    made.transport = SimpleNamespace(get_write_buffer_size=lambda: next(left), abort=lambda: waits.append("abort"))
    made.loop = SimpleNamespace(call_later=lambda seconds, *call: waits.append((seconds, *call)))
    made._seconds, made._stalled = 5, None
    made.pause_writing()
    for _ in range(3):
        seconds, check, before = waits.pop()
        assert seconds == 5 and not waits
        check(before)
    assert waits == ["abort"]


class Shown:
    """A model's processor with another chat template, and with a token for every word."""

    def __init__(self, loaded, template):
        model, processor, _ = loaded
        self.processor = copy.deepcopy(processor)
        self.processor.chat_template, self.processor.tokenizer.unk_token = template, None
        self.model, self.name, self.limits, self.allowed_hosts = model, "miniature", Limits(), ()


def said(loaded, template, *turns):
    """The sentence by which messages are refused under a chat template."""
    messages = [{"role": role, "content": content} for role, content in turns]
    with pytest.raises(ServiceError) as caught:
        Preparer(Shown(loaded, template)).prepare(ChatRequest.model_validate({"messages": messages}), 0)
    assert (caught.value.status, caught.value.param) == (422, "messages")
    return str(caught.value)


EVERY = "{% for m in messages %}<user>{% for p in m['content'] %}{{ p['text'] | trim }}{% endfor %}{% endfor %}"
USERS = EVERY.replace("in messages", "in messages if m['role'] == 'user'")
WHOLE = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"


def test_no_token_comes_of_two_parts(loaded):
    for parts in (["yes <", "/s>"], ["yes", "<ima ", "\n", " ge>"], ["<user", ">"]):
        content = [{"type": "text", "text": part} for part in parts]
        assert "a special token of the model" in said(loaded, EVERY, ("user", content))


def test_a_developer_is_the_system():
    asked = ChatRequest.model_validate({"messages": [{"role": "developer", "content": "a"}]})
    assert asked.messages[0].role == "system"


def test_messages_that_a_template_does_not_show_are_refused(loaded):
    for template in (USERS, WHOLE):
        message = said(loaded, template, ("system", "be\nbrief"), ("user", "yes"))
        assert message == (
            "the model's chat template does not show the system's message 'be\\nbrief': say it in a user's message"
        )
    shown = Preparer(Shown(loaded, EVERY)).prepare(
        ChatRequest.model_validate(
            {"messages": [{"role": "system", "content": []}, {"role": "system", "content": " be\nbrief []"}]}
        ),
        1,
    )
    assert shown[0].length > 1


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
            for given in ("", "Bearer", "Bearer secret", "secret", "secret-Schlüssel", "Basic secret-Schlüssel"):
                refused = client.get("/v1/models", headers={"Authorization": given.encode()})
                assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
            for given in ("Bearer secret-Schlüssel", "bearer secret-Schlüssel", "BEARER  secret-Schlüssel"):
                header = {"Authorization": given.encode()}
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


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_cut_off_when_the_service_ends_is_told_so(loaded, monkeypatch, capfd, caplog, stream):
    """A stream that has begun breaks off; and what the model goes on to say finds nobody, quietly."""
    stock, begun, held = ModelThread._generate, threading.Event(), threading.Event()

    def slow(*given):
        begun.set()
        held.wait(30)
        return stock(*given)

    monkeypatch.setattr(ModelThread, "_generate", slow)
    running = Service(*loaded, limits=Limits(upload_seconds=1))
    body = sample_body(of_miniature("test", 0, 1, ["ocr"])[0], stream=stream)
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(httpx.post, f"{running.url}/v1/chat/completions", json=body, timeout=60)
        wait(begun.is_set)
        running.server.should_exit = True
        if stream:
            with pytest.raises(httpx.RemoteProtocolError):
                asked.result(60)
        else:
            assert asked.result(60).status_code == 503 and asked.result().json()["error"]["code"] == "draining"
    running._thread.join(30)
    held.set()
    running.stop()
    assert "Traceback" not in capfd.readouterr().err and not [one for one in caplog.records if one.exc_info]


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
