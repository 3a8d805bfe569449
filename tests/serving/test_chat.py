"""Chat completions: every answer is the one that `ask` gives to the same question alone."""

import json
import re
import socket
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from openai import OpenAI

from benchmarks.cost import serve_load
from benchmarks.served import sample_body as body
from codebook.inference.ask import ask
from codebook.miniature.samples import of_miniature
from codebook.serving.model_thread import ModelThread
from tests.serving.running import wait


@pytest.fixture(scope="module")
def client(service):
    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("family", ["ocr", "multi", "video"])
def test_answers_equal_ask(client, loaded, family):
    """One picture, three and six; whole and as a stream."""
    model, processor, schedule = loaded
    for sample in of_miniature("test", 0, 1, [family]):
        [expected] = ask(model, processor, [sample.pictures()], [sample.question], schedule)
        whole = client.chat.completions.create(**body(sample))
        assert whole.choices[0].message.content == expected.text
        text, chunks = streamed(client, **body(sample), stream_options={"include_usage": True})
        assert text == expected.text and chunks[-1].choices == []
        counts = {"seen": sum(c[0] for c in expected.counts), "kept": sum(c[-1] for c in expected.counts)}
        assert whole.usage.codebook == counts == chunks[-1].usage.codebook


def streamed(client, **fields):
    """(text, events) of a stream."""
    chunks = list(client.chat.completions.create(**fields, stream=True))
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices), chunks


@pytest.mark.parametrize("length", [None, 1, 2, 3, 4, 5])
def test_a_stream_is_the_whole_answer_in_parts(client, length):
    """However long it may be: one more than its words, just its words and its end, and less. Three words here."""
    [sample] = of_miniature("test", 0, 1, ["ocr"])
    fields = body(sample, max_tokens=length)
    whole = client.chat.completions.create(**fields)
    text, chunks = streamed(client, **fields, stream_options={"include_usage": True})
    assert text == whole.choices[0].message.content == " ".join(["5", "1", "8"][:length])
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == min(length or 4, 4)
    ended = "length" if length is not None and length < 4 else "stop"  # the end is a token of its own
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == ended
    assert not [chunk for chunk in chunks[:-1] if chunk.usage or not chunk.choices]


@pytest.mark.parametrize("fields", [{}, {"stream_options": {"include_usage": False}}])
def test_a_stream_has_its_usage_only_if_asked_for(client, fields):
    [sample] = of_miniature("test", 0, 1, ["ocr"])
    text, chunks = streamed(client, **body(sample), **fields)
    assert text == "5 1 8" and chunks[-1].choices[0].finish_reason == "stop"
    assert not [chunk for chunk in chunks if chunk.usage]


def test_a_stream_asks_what_stands_in_between_to_pass_its_events_on(service):
    [sample] = of_miniature("test", 0, 1, ["ocr"])
    headers = httpx.post(f"{service.url}/v1/chat/completions", json=body(sample, stream=True)).headers
    assert headers["cache-control"] == "no-cache" and headers["x-accel-buffering"] == "no"


def test_many_clients_get_what_one_gets(service):
    """The short version of `benchmarks/cost/serve_load.py`: all families of tasks, every fourth request as a stream."""
    before = scrape(service)
    asked = serve_load.requests(1)
    _, replies = serve_load.load_service(service.url, asked, 44, 8)
    assert len(replies) == 44 and not [(reply, wanted) for reply, wanted in replies if reply != wanted]
    after = scrape(service)
    change = {name: value - before.get(name, 0) for name, value in after.items()}
    chat = 'endpoint="/v1/chat/completions"'
    assert change[f'codebook_requests_total{{{chat},status="200"}}'] == 44
    assert change[f"codebook_request_seconds_count{{{chat}}}"] == 44
    assert change["codebook_batch_size_sum"] == 44 and change["codebook_batch_size_count"] < 44
    assert change["codebook_generate_seconds_count"] == change["codebook_batch_size_count"]
    for state in ("seen", "kept"):
        total = sum(wanted.codebook[state] for _, wanted in replies)
        assert change[f'codebook_visual_tokens_total{{state="{state}"}}'] == total
    assert after["codebook_waiting_requests"] == 0


def scrape(service):
    """Every sample that Prometheus would read, by its name and labels."""
    text = httpx.get(f"{service.url}/metrics").raise_for_status().text
    return {name: float(value) for name, value in re.findall(r"(?m)^(\w+(?:\{.*\})?) (\S+)$", text)}


def test_the_api_beside_answers(client, service):
    assert [model.id for model in client.models.list()] == ["miniature"]
    assert client.models.retrieve("miniature").owned_by == "codebook"
    with pytest.raises(openai.NotFoundError, match="the model is 'miniature'"):
        client.models.retrieve("other")
    [sample] = of_miniature("test", 0, 1, ["ocr"])
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(**body(sample, max_tokens=10**9))
    assert caught.value.param == "max_tokens" and caught.value.body["message"].startswith("max_tokens is 1000000000")
    info = next(name for name in scrape(service) if name.startswith("codebook_info{"))
    assert (
        'keep="0.2"' in info
        and 'method="codebook-farthest' in info
        and re.search('codebook_sha256="[0-9a-f]{64}"', info)
    )


def test_lengths_sampling_and_conversations(client):
    [sample] = of_miniature("test", 0, 1, ["box"])
    short = client.chat.completions.create(**body(sample, max_tokens=2))
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)
    whole = client.chat.completions.create(**body(sample))
    assert whole.choices[0].finish_reason == "stop"
    drawn = [
        client.chat.completions.create(**body(sample, temperature=2, seed=seed, max_tokens=8))
        .choices[0]
        .message.content
        for seed in (1, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    # The fields that clients send although they say nothing.
    neutral = {"n": 1, "temperature": 0, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "stop": None}
    neutral |= {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "stop": []}
    neutral |= {"safety_identifier": "a", "prompt_cache_key": "a", "prompt_cache_retention": "24h", "top_logprobs": 0}
    neutral |= {"metadata": {"a": "b"}, "reasoning_effort": "none", "verbosity": "medium", "function_call": "none"}
    again = client.chat.completions.create(**body(sample, **neutral), user="me")
    assert again.choices[0].message.content == whole.choices[0].message.content
    [turn] = body(sample)["messages"]
    fine = [part | {"prompt_cache_breakpoint": {"mode": "explicit"}} for part in turn["content"]]
    fine[0]["image_url"] = fine[0]["image_url"] | {"detail": "high"}
    again = client.chat.completions.create(**body(sample) | {"messages": [turn | {"content": fine}]})
    assert again.choices[0].message.content == whole.choices[0].message.content
    # An earlier answer as it came, and as other services give it.
    asked = body(sample)
    earlier = [whole.choices[0].message, whole.choices[0].message.model_dump() | {"annotations": [], "tool_calls": []}]
    later = [
        client.chat.completions.create(**asked | {"messages": [*asked["messages"], own, *asked["messages"]]})
        for own in earlier
    ]
    assert later[0].choices[0].message.content == later[1].choices[0].message.content


def test_samples_are_drawn_as_asked_whatever_the_model_would_leave_out(client, loaded, monkeypatch):
    [sample] = of_miniature("test", 0, 1, ["box"])
    asked = [body(sample, temperature=2, seed=seed, max_tokens=8) for seed in (1, 2)]
    drawn = [client.chat.completions.create(**one).choices[0].message.content for one in asked]
    narrow = {"min_p": 0.99, "top_h": 0.01, "typical_p": 0.01, "epsilon_cutoff": 0.99, "eta_cutoff": 0.99, "top_k": 1}
    for name, value in narrow.items():
        with monkeypatch.context() as own:
            own.setattr(loaded[0].generation_config, name, value)
            again = [client.chat.completions.create(**one).choices[0].message.content for one in asked]
        assert again == drawn, name


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/explain", "a stream"])
def test_a_client_that_leaves_frees_its_slot(service, monkeypatch, path):
    """Before the answer, and in the middle of a stream; an answer that has no end would take long."""
    stream = path == "a stream"
    path = "/v1/chat/completions" if stream else path
    thread = service.state.model_thread
    monkeypatch.setattr(service.state.model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(thread, "_ends", thread._ends[:0])
    [sample] = of_miniature("test", 0, 1, ["cap"])
    content = json.dumps(body(sample) | ({"stream": True} if stream else {})).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    place = urlsplit(service.url)
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(head.encode() + content)
        while stream and b"data: " not in connection.recv(4096):
            pass
        wait(lambda: thread._running)
        assert service.state.active == 1
    wait(lambda: not service.state.active and not thread._running)
    if not stream:
        assert scrape(service)[f'codebook_requests_total{{endpoint="{path}",status="499"}}'] == 1


def test_a_stream_that_fails_says_so_in_the_shape_of_errors(client, monkeypatch):
    def failing(*_):
        raise RuntimeError('a "detail"\nof ours')

    monkeypatch.setattr(ModelThread, "_generate", failing)
    [sample] = of_miniature("test", 0, 1, ["ocr"])
    with pytest.raises(openai.APIError, match="the model could not answer: RuntimeError") as caught:
        list(client.chat.completions.create(**body(sample), stream=True))
    assert caught.value.code == "generation_failed" and caught.value.type == "server_error"
