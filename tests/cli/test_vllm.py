"""What the command line says to vLLM; vLLM itself is not needed."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from codebook.cli import vllm
from tests.models.families import FAMILIES

ROOT = Path(__file__).parents[2]
WEIGHTS, BOOK = str(ROOT / "codebook/miniature/weights"), str(ROOT / "indexes/miniature")
OVERRIDES = {
    "architectures": ["CodebookLlavaForConditionalGeneration"],
    "codebook_config": {"method": "codebook-middle", "keep": 0.25, "codebook": BOOK},
}


def test_the_arguments_are_printed_for_copying(run):
    code, out, err = run("vllm-args", "miniature", "--keep", "0.25")
    assert code == 0 and shlex.split(out) == ["--model", WEIGHTS, "--hf-overrides", json.dumps(OVERRIDES)]
    assert "seeded-middle without mass-preserving attention" in err
    method = "codebook-farthest(representatives=2)"
    code, out, err = run("vllm-args", "miniature", "--method", "seeded(representatives=2)", "--keep", "0.25", "--json")
    assert code == 0 and json.loads(out)["codebook_config"] == {"method": method, "keep": 0.25, "codebook": BOOK}
    code, out, err = run("vllm-args", WEIGHTS, "--method", "uniform", "--keep", "0.5", "--json")
    assert code == 0 and not err and json.loads(out)["codebook_config"] == {"method": "uniform", "keep": 0.5}


def test_what_vllm_would_refuse_is_refused_here(refused, tmp_path):
    refused("vllm-args", "miniature", "--method", "cls", words=["cls needs the vision tower's attention"])
    refused("vllm-args", "miniature", "--method", "farthest+mass", words=["use farthest"])
    refused("vllm-args", "miniature", "--method", "restore", words=["divprune-merged needs to merge tokens"])
    refused("vllm-args", "miniature", "--keep", "1.5", words=["keep must be a fraction"])
    refused("vllm-args", "miniature", "--codebook", ROOT / "indexes/eyes", words=["dimension 576", "have 160"])
    refused("vllm-args", WEIGHTS, words=["no codebook is named for", "--codebook FOLDER"])
    FAMILIES["paligemma"].config().save_pretrained(tmp_path)
    refused("vllm-args", tmp_path, "--method", "uniform", words=["paligemma are not pruned in vLLM", "llava_next"])


@pytest.fixture
def started(monkeypatch, run, tmp_path):
    """The command line that `codebook serve --engine vllm` becomes, and its key."""

    def call(*more):
        def become(program, words):
            assert program == words[0] == sys.executable
            found.append((words[1:], os.environ.get("VLLM_API_KEY")))

        found = []
        monkeypatch.setattr(os, "execv", become)
        monkeypatch.setattr(vllm, "find_spec", lambda name: name)
        monkeypatch.setenv("VLLM_API_KEY", "")
        assert run("serve", "miniature", "--engine", "vllm", "--keep", "0.25", *more)[0] == 0
        return found[0]

    return call


def test_serve_becomes_vllms_own_server(started, tmp_path):
    words, key = started()
    assert words == [
        "-m", "vllm.entrypoints.openai.api_server", "--model", WEIGHTS, "--served-model-name", "miniature",
        "--hf-overrides", json.dumps(OVERRIDES), "--host", "127.0.0.1", "--port", "8000", "--dtype", "auto",
        "--allowed-media-domains", "data-urls-only.invalid",
    ]  # fmt: skip
    assert not key
    (tmp_path / "key").write_text("secret\n")
    words, key = started("--api-key-file", tmp_path / "key", "--allow-urls", "example.com", "--port", "81", "--dtype",
                         "float32", "--engine-args", "--max-model-len 99", "--method", "uniform")  # fmt: skip
    assert key == "secret" and "secret" not in words
    assert words[-4:] == ["--allowed-media-domains", "example.com", "--max-model-len", "99"]
    assert words[words.index("--port") + 1] == "81" and words[words.index("--dtype") + 1] == "float32"
    assert json.loads(words[words.index("--hf-overrides") + 1])["codebook_config"] == {
        "method": "uniform",
        "keep": 0.25,
    }


@pytest.mark.parametrize("own", [None, "1"])
def test_vllm_follows_no_redirects_unless_its_variable_says_so(started, monkeypatch, own):
    """A host that is allowed could send it anywhere."""
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "")
    monkeypatch.delenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS")
    if own is not None:
        monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", own)
    started("--allow-urls", "example.com")
    assert os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == (own or "0")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("miniature", "--limit", "max_tokens=3"), ["--limit is not for --engine vllm"]),
        (("miniature", "--device", "cpu"), ["--device is not for --engine vllm"]),
        (("miniature", "--seed", "3"), ["--seed is not for --engine vllm"]),
        (("miniature", "--replicas", "2"), ["--replicas and --address are Ray's"]),
        (("miniature", "--codebook", "a=b"), ["one codebook"]),
        (("miniature", "--allow-urls", "example.com:80"), ["example.com:80 without its port"]),
        (("miniature", "--method", "fastv"), ["fastv needs attention", "codebook-farthest"]),
        ((), ["needs a MODEL"]),
    ],
)
def test_what_vllms_server_does_not_take_is_refused(monkeypatch, refused, given, words):
    monkeypatch.setattr(vllm, "find_spec", lambda name: name)
    refused("serve", *given, "--engine", "vllm", words=words)


def test_without_vllm_the_engine_is_refused(monkeypatch, refused):
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    refused("serve", "miniature", "--engine", "vllm", words=["pip install vllm"])
    refused("serve", "miniature", "--engine-args", "--seed 3", words=["--engine vllm"])
