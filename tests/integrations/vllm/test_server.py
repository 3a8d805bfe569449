"""vLLM's own server in a process of its own, started by `codebook serve`, asked by eight clients at once."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from codebook import load, miniature
from tests.integrations.vllm.running import ROOT, expected, needs_vllm, settings, written

pytestmark = needs_vllm
START_SECONDS = 900
KEEP = 0.2


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable, ROOT / "cli.py", "serve", "miniature", "--engine", "vllm", "--keep", KEEP, "--port", port,
        "--dtype", "float32", "--engine-args", "--enforce-eager --max-model-len 1024 --max-num-seqs 8",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as written_to:
        words = [str(word) for word in command]
        server = subprocess.Popen(words, env=environment, stdout=written_to, stderr=subprocess.STDOUT)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while server.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(f"the server did not start: {log.read_text()[-3000:]}")
        yield address
    finally:
        server.terminate()
        server.wait()


def picture(image):
    held = io.BytesIO()
    image.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def post(url, images, question, **more):
    content = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    body = {
        "model": "miniature", "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        "temperature": 0, "max_tokens": 24, "return_token_ids": True, **more,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_eight_clients_get_the_answers_of_transformers(url):
    model, processor = load("miniature", "cpu")
    asked = [q for family in ("exist", "ocr", "multi") for q in miniature.tasks(family, "test", 0, 11)]
    given = settings("codebook-middle", KEEP)  # the default, without its mass
    wanted = expected(model, processor, [(written(processor, q), q.images) for q in asked], given)
    with ThreadPoolExecutor(8) as clients:
        said = list(clients.map(lambda q: post(url, map(picture, q.images), q.question), asked))
    assert [one["choices"][0]["token_ids"] for one in said] == wanted
    text = len(processor.tokenizer(written(processor, asked[0]), add_special_tokens=False)["input_ids"])
    assert said[0]["usage"]["prompt_tokens"] == text - 1 + 28  # 144 * 0.2


def test_only_pictures_in_the_request_are_read(url):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(url, [f"{url}/health"], "read the number.")
    assert refused.value.code == 400 and "allowed domains" in refused.value.read().decode()
