"""Loading: what fits loads, and what is damaged, half there or brings code of its own is refused in one line."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file

from codebook import CodebookError, Schedule, ask, models
from codebook.miniature.scenes import scene
from codebook.models.loading import SHIPPED_MODELS, load_processor, read_config_of
from tests.hub import Hub, Repository, serving
from tests.models.families import FAMILIES

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9737216\n"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(SHIPPED_MODELS["miniature"], tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_loads_what_was_saved(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", lambda *_, **__: "processor")
    saved = FAMILIES[name].make()
    saved.save_pretrained(tmp_path)
    model, processor = models.load(str(tmp_path), "cpu")
    assert processor == "processor" and type(model) is type(saved)
    weights = model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in saved.state_dict().items())


def weights(change):
    """The same file with other tensors: `change` gets each and its key, and returns None to leave it out."""

    def write(folder):
        held = load_file(folder / "model.safetensors")
        changed = {key: change(key, value) for key, value in held.items()}
        changed = {key: value.contiguous() for key, value in changed.items() if value is not None}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    return write


def without(part):
    return weights(lambda key, value: None if part in key else value)


def config(**changes):
    def write(folder):
        written = json.loads((folder / "config.json").read_text())
        for path, value in changes.items():
            *parts, last = path.split("__")
            held = written
            for part in parts:
                held = held[part]
            held[last] = value
        (folder / "config.json").write_text(json.dumps(written))

    return write


def file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def sharded(folder):
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def removed(name):
    return lambda folder: (folder / name).unlink()


def pipe(name):
    def write(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return write


def linked(name):
    def write(folder):
        (folder / name).unlink()
        (folder / name).symlink_to("nowhere")

    return write


def sparse(name):
    def write(folder):
        with (folder / name).open("r+b") as file:
            file.truncate(2**30)

    return write


NAN, INF = float("nan"), float("inf")
DAMAGE = {
    "no LLM": (without("language_model"), "describes 4,847,776 weights and its files hold 91 tensors"),
    "no projector": (without("projector"), "lack weights.*multi_modal_projector.linear_1.bias.* and 1 more; .*fetch"),
    "no norm": (without("layers.3.input_layernorm"), "lack weights.*layers.3.input_layernorm.weight"),
    "other shapes": (
        weights(lambda key, value: value[:-2] if key.endswith("projector.linear_1.weight") else value),
        "other shapes.*multi_modal_projector.linear_1.weight",
    ),
    "other patches": (config(vision_config__patch_size=16), "describes 4,907,680 weights"),
    "fewer words": (config(text_config__vocab_size=50), "other shapes.*lm_head.weight"),
    "fewer layers": (config(text_config__num_hidden_layers=6), "hold layers.*layers.10.* and 51 more"),
    "no layers": (config(text_config__num_hidden_layers=0), "hold layers.* and 105 more"),
    "more layers": (config(text_config__num_hidden_layers=13), "describes"),
    "far too many layers": (config(text_config__num_hidden_layers=10**9), "describes 1000000000 layers"),
    "a default LLM": (config(text_config=None), "describes 6,756,760,448 weights"),
    "odd heads": (config(text_config__num_attention_heads=7), "cannot load.*attention heads"),
    "a word for a number": (config(text_config__hidden_size="many"), "cannot load.*'hidden_size'"),
    "another image token": (config(image_token_index=77), "marks images by token 4 and its config.json by 77"),
    "nan": (weights(lambda key, value: value * NAN if "layers.3.mlp.up" in key else value), "not numbers.*layers.3"),
    "infinite": (weights(lambda key, value: value * INF if "linear_1.bias" in key else value), "not numbers.*linear_1"),
    "half a file": (cut, "weights are damaged or not all there.*fetch"),
    "an empty file": (file("model.safetensors", b""), "weights are damaged or not all there"),
    "a missing shard": (sharded, "cannot load.*model-2.safetensors"),
    "no weights": (removed("model.safetensors"), "cannot load.*model.safetensors"),
    "pointer for weights": (file("model.safetensors", POINTER), "safetensors is a pointer of git-lfs.*git lfs pull"),
    "pointer for words": (file("tokenizer.json", POINTER), "tokenizer.json is a pointer of git-lfs"),
    "pointer for config": (file("config.json", POINTER), "config.json is a pointer of git-lfs"),
    "list for config": (file("config.json", b"[]"), "cannot load"),
    "deep config": (file("config.json", b'{"a":' * 10**5 + b"1" + b"}" * 10**5), "cannot load"),
    "bytes for config": (file("config.json", b"\xff\xfe\x00"), "cannot load.*config.json"),
    "no config": (removed("config.json"), "holds no config.json"),
    "unknown type": (config(model_type="nothing"), "is of type .nothing., which transformers has no class for"),
    "empty words": (file("tokenizer.json", b""), "cannot load"),
    "other words": (file("tokenizer.json", b"{}"), "cannot load"),
    "no words": (removed("tokenizer.json"), "cannot load.*tokenizer"),
    "list for words": (file("tokenizer_config.json", b"[]"), "cannot load"),
    "list for processor": (file("processor_config.json", b"[]"), "cannot load"),
    "half a processor": (file("processor_config.json", b'{"image'), "cannot load.*processor_config.json"),
    "pipe for weights": (pipe("model.safetensors"), "model.safetensors is no regular file"),
    "pipe for words": (pipe("tokenizer.json"), "tokenizer.json is no regular file"),
    "link to nothing": (linked("processor_config.json"), "processor_config.json is no regular file, or a link to none"),
    "a gigabyte of zeros": (sparse("config.json"), "config.json has 1,073,741,824 bytes, more than"),
    "a huge template": (sparse("chat_template.jinja"), "chat_template.jinja has 1,073,741,824 bytes, more than"),
    "no processor": (removed("processor_config.json"), "cannot load.*processor"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_in_one_line(what, folder):
    damage, says = DAMAGE[what]
    damage(folder)
    with pytest.raises(CodebookError, match=says) as caught:
        models.load(str(folder), "cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + 2 * len(str(folder))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a\nb", "", " ", "../..", "/dev/null", "https://x.y/z"])
def test_odd_names(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CodebookError, match=r"cannot load|holds no config.json|name is empty") as caught:
        models.load(name, "cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 600


def test_a_model_loaded_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        model, _ = models.load("miniature", "cpu")
    model(input_ids=torch.tensor([[2, 5, 9, 6]])).logits.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_what_only_other_programs_need_is_no_damage(folder):
    held = load_file(folder / "model.safetensors") | {"v_head.weight": torch.zeros(3), "rotary.inv_freq": torch.ones(2)}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = models.load(str(folder), "cpu")
    assert models.identity(model) == models.identity(models.load("miniature", "cpu")[0])


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlavaConfig as Mine, LlavaForConditionalGeneration, PreTrainedTokenizerFast, LlavaProcessor
"""
CODES = {
    "config.json": {"AutoConfig": "mine.Mine", "AutoModelForImageTextToText": "mine.LlavaForConditionalGeneration"},
    "tokenizer_config.json": {"AutoTokenizer": [None, "mine.PreTrainedTokenizerFast"]},
    "processor_config.json": {"AutoProcessor": "mine.LlavaProcessor"},
}


LOAD = """
import sys
from codebook import CodebookError, load
for folder in sys.argv[1:]:
    try:
        print("loaded", type(load(folder, "cpu")[0]))
    except CodebookError as error:
        print(error)
"""


def test_code_that_comes_with_a_model_never_runs(tmp_path):
    """Not even when whoever pipes into the command would have said yes."""
    marker, folders = tmp_path / "ran", []
    for where, known in [*((where, False) for where in CODES), ("config.json", True)]:
        folders.append(folder := tmp_path / str(len(folders)))
        shutil.copytree(SHIPPED_MODELS["miniature"], folder)
        (folder / "mine.py").write_text(CODE.format(marker=str(marker)))
        written = json.loads((folder / where).read_text())
        written["auto_map"] = CODES[where]
        if not known:  # a class that transformers does not have: it would have to run the code
            written |= {"model_type": "mine", "tokenizer_class": "Mine", "processor_class": "Mine"}
        (folder / where).write_text(json.dumps(written))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *folders], input="y\n" * 99, capture_output=True, text=True, check=False
    )
    assert not marker.exists() and done.returncode == 0 and "[y/N]" not in done.stdout + done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders)
    assert (
        "is of type 'mine', which transformers has no class for, and code that comes with a model is never" in lines[0]
    )
    assert lines[-1].startswith("loaded <class 'transformers.models.llava.")  # transformers' own class, not theirs


def test_weights_that_only_code_of_their_own_has_a_place_for(folder):
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"auto_map": CODES["config.json"]})
    )
    held = load_file(folder / "model.safetensors") | {"gate.weight": torch.zeros(3)}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CodebookError, match=r"code of its own .*no place for: gate.weight; use a checkpoint that was"):
        models.load(str(folder), "cpu")


@pytest.mark.parametrize("device", ["cuda:7", "cuda:-1", "mps", "xpu", "gpu", "", "meta", "cpu:x", "hpu", "x" * 999])
def test_a_device_that_is_not_there_is_refused_before_weights_are_read(device, monkeypatch):
    monkeypatch.setattr(hf.AutoModelForImageTextToText, "from_pretrained", None)
    if device == "":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the default
        device = None
    with pytest.raises(CodebookError, match=r"cannot use the device '.*; use cpu") as caught:
        models.load("miniature", device)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_precision_and_attention_are_the_ones_asked_for():
    plain, (model, _) = models.load("miniature", "cpu")[0], models.load("miniature", "cpu", "auto")
    assert plain.dtype == model.dtype == torch.float32  # what config.json says; its weights are stored in float16
    model, _ = models.load("miniature", "cpu", "bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16 == models.load("miniature", "cpu", torch.bfloat16)[0].dtype
    assert model.get_decoder().config._attn_implementation == "eager"
    # A codebook belongs to the weights, answers in a journal to what computed them.
    assert models.same_fingerprint(models.fingerprint(model), models.fingerprint(plain))
    assert models.identity(model) != models.identity(plain)


def test_on_the_device_that_accelerate_chooses():
    pytest.importorskip("accelerate")
    picture, answers = Image.fromarray(scene("test", 0, 0, 0).pixels), []
    for options in ({"device": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}):
        model, processor = models.load("miniature", **options)
        schedule = Schedule.for_model(model, "seeded", 0.25)
        answers += ask(model, processor, [[picture]], ["describe."], schedule)
    assert answers[0].text == answers[1].text == answers[2].text
    assert answers[0].kept == answers[1].kept == answers[2].kept


def test_a_model_of_the_hub_is_there_without_a_connection(monkeypatch):
    files = {file.name: file.read_bytes() for file in SHIPPED_MODELS["miniature"].iterdir()}
    hub = Hub({"owner/cached": Repository()})
    hub.repositories["owner/cached"].commit(files)
    with serving(hub):
        fetched, _ = models.load("owner/cached", "cpu")
        with pytest.raises(CodebookError, match="cannot load owner/none: owner/none is not a"):
            models.load("owner/none", "cpu")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("the hub was asked again"))
    again, processor = models.load("owner/cached", "cpu")
    assert torch.equal(again.lm_head.weight, fetched.lm_head.weight) and processor.tokenizer.vocab_size > 100


@pytest.mark.parametrize("read", [models.load, load_processor, read_config_of])
def test_a_name_without_a_connection_is_one_quick_error(monkeypatch, capfd, read):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("the hub was asked again"))
    words = "cannot load owner/away: it is no folder and not whole in the hub's cache, and http.* is not reached"
    with pytest.raises(CodebookError, match=words):
        read("owner/away")
    with pytest.raises(
        CodebookError, match=r"owner/away: .* nothing may be fetched \(HF_HUB_OFFLINE, local_files_only"
    ):
        read("owner/away", local_files_only=True)
    with pytest.raises(
        CodebookError, match=r"cannot load \./a/b/c: it is no folder and no name on the Hugging Face Hub"
    ):
        read("./a/b/c")
    with pytest.raises(CodebookError, match="it is a file; name the folder"):
        read(__file__)
    assert capfd.readouterr() == ("", "")


def test_what_transformers_takes_is_passed_on(monkeypatch):
    """To the files that it is about: a revision is that of config and processor, too."""
    seen = {}
    monkeypatch.setattr("codebook.models.loading._hub_answers", lambda name, files: True)
    monkeypatch.setattr("codebook.models.loading._check_config", lambda name, folder, files: seen.update(config=files))
    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", lambda name, **given: seen.update(processor=given))
    monkeypatch.setattr("codebook.models.loading._check_processor", lambda *given: None)
    model = FAMILIES["llava"].make()
    fits = {"missing_keys": (), "mismatched_keys": (), "unexpected_keys": ()}

    def loaded(name, **given):
        seen["model"] = given
        return model, fits

    monkeypatch.setattr(hf.AutoModelForImageTextToText, "from_pretrained", loaded)
    packed = hf.BitsAndBytesConfig(load_in_8bit=True)
    models.load("owner/name", "cpu", revision="v1", quantization_config=packed, low_cpu_mem_usage=True)
    assert seen["config"] == seen["processor"] == {
        "trust_remote_code": False, "local_files_only": False, "revision": "v1",
    }  # fmt: skip
    assert seen["model"].items() >= {**seen["config"], "low_cpu_mem_usage": True, "dtype": "float32"}.items()
    assert seen["model"]["quantization_config"] is packed and seen["model"]["device_map"] == {"": "cpu"}


def test_a_processor_without_its_model_is_that_of_the_same_revision(monkeypatch):
    seen, said = {}, {"revision": "v1", "token": "secret"}
    monkeypatch.setattr("codebook.models.loading._hub_answers", lambda name, files: True)
    config = FAMILIES["llava"].make().config
    monkeypatch.setattr(
        "codebook.models.loading._check_config", lambda name, folder, files: seen.update(config=files) or config
    )
    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", lambda name, **given: seen.update(processor=given) or name)
    family, processor = load_processor("owner/name", **said, attn_implementation="eager")
    assert (family.name, processor) == ("llava", "owner/name")
    assert seen["config"] == seen["processor"] == {"trust_remote_code": False, "local_files_only": False, **said}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "int8"}, "no dtype 'int8': use float32, bfloat16, float16, auto"),
        ({"dtype": torch.int8}, "no dtype 'torch.int8': use float32"),
        ({"dtype": float}, r"no dtype .*float.*use float32"),
        ({"device": 3}, "cannot use the device '3': .*; use cpu"),
        ({"device": torch.device("meta")}, "cannot use the device 'meta'"),
        ({"device": "cpu", "device_map": "auto"}, "device and device_map both say where the model goes"),
        ({"device_map": "cuda:7"}, "no device_map 'cuda:7': use auto, .* or name a device instead"),
        ({"device_map": {"": 77}}, "cannot use the device 'cuda:77'.*; use cpu"),
        ({"device_map": {"model": "cpu", "lm_head": "nowhere"}}, "cannot use the device 'nowhere'.*; use cpu"),
        ({"device_map": 77}, "cannot use the device 'cuda:77'.*; use cpu"),
        ({"revision": "main"}, "miniature is on this machine"),
        ({"trust_remote_code": True}, "trust_remote_code is not for users to say"),
        ({"torch_dtype": "float16"}, "there is dtype"),
    ],
)
def test_arguments_are_refused_before_weights_are_read(options, says, monkeypatch):
    monkeypatch.setattr(hf.AutoModelForImageTextToText, "from_pretrained", None)
    with pytest.raises(CodebookError, match=says):
        models.load("miniature", **options)


def test_a_device_of_torch():
    assert models.load("miniature", torch.device("cpu"))[0].device == torch.device("cpu")


@pytest.mark.parametrize("name", [None, 3, ["miniature"], b"miniature"])
def test_what_is_no_name(name):
    for load in (models.load, load_processor):
        with pytest.raises(CodebookError, match=r"a model is said by its name or folder, not by .*: name `miniature`"):
            load(name)


def test_arguments_that_transformers_refuses():
    with pytest.raises(CodebookError, match=r"cannot load miniature: .*; check the name, and attn_implementation$"):
        models.load("miniature", "cpu", attn_implementation="nonsense")
    with pytest.raises(CodebookError, match=r"cannot load miniature: .*; check the name, and nonsense$"):
        models.load("miniature", "cpu", nonsense=1)


def test_without_accelerate(monkeypatch):
    monkeypatch.setattr("codebook.models.loading.find_spec", lambda name: None)
    with pytest.raises(CodebookError, match=r"device_map needs accelerate.*pip install accelerate"):
        models.load("miniature", device_map="auto")
