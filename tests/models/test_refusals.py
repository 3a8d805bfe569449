"""What cannot work is refused, by one sentence that says why and what to use instead."""

import json
import re
from contextlib import nullcontext

import pytest
import torch
import transformers as hf

from codebook import models
from codebook.errors import CodebookError
from codebook.models.foreign import INSTEAD
from codebook.pruning import METHODS, Downsample, Random, Schedule, Stage, remember
from tests.models.cells import model
from tests.models.families import FAMILIES
from tests.models.prompts import VIDEO
from tests.tiny import IMAGE

PRE = Schedule([Stage(0, 0.5, Random())])


def refused(match):
    return pytest.raises(CodebookError, match=re.compile(rf"^(?!.*\n).*{match}", re.DOTALL))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (hf.MllamaConfig(), "mllama cross-attend to their images.*use a model that"),
        (
            hf.LlavaConfig(text_config=hf.Qwen2Config(num_hidden_layers=1, layer_types=["chunked_attention"])),
            "chunked_attention layers, which nobody has checked; use",
        ),
        (hf.DeepseekOcr2Config(), "deepseek_ocr2 are not supported, with visual tokens that are learned queries.*use"),
        (hf.Idefics2Config(), "idefics2 are not supported, with visual tokens that are learned queries.*use"),
        (hf.Florence2Config(), "florence2 are not supported, with images that go through an encoder of text.*use"),
        (hf.Gemma3nConfig(), "gemma3n are not supported, with several copies of each hidden state.*use"),
        (hf.Granite4VisionConfig(), "granite4_vision whose image tokens are empty in the first layer is not.*use"),
        (hf.Phi4MultimodalConfig(), "phi4_multimodal are not supported, with images that the decoder itself.*use"),
        (
            hf.PerceptionLMConfig(vision_config={"model_type": "timm_wrapper"}),
            "perception_lm.*with a vision tower of timm",
        ),
        (hf.BlipConfig(), "blip are not supported; use one of the .*docs/models.md, such as llava, qwen2_5_vl"),
        (hf.LlavaConfig(vision_config=hf.SiglipVisionConfig()), "'default' features is not supported; use"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models(config, why, tmp_path):
    """Before their weights are read."""
    config.save_pretrained(tmp_path)
    with refused(why):
        models.load(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        ("internvl_chat", "use a checkpoint of type internvl, such as OpenGVLab/InternVL3-1B-hf$"),
        ("qwen5_vl", "did you mean qwen2_5_vl.*use a checkpoint that was converted to a type of docs/models.md$"),
    ],
)
@pytest.mark.parametrize("code", [{}, {"auto_map": {"AutoConfig": "mine.Mine"}}], ids=["", "code"])
def test_types_that_transformers_has_no_class_for(kind, instead, code, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | code))
    with refused(f"is of type '{kind}', which transformers has no class for, .*never run: {instead}"):
        models.load(str(tmp_path))


def test_what_to_use_instead_is_supported():
    assert {instead.split(",")[0] for instead in INSTEAD.values()} <= models.FAMILIES.keys()
    assert not INSTEAD.keys() & hf.CONFIG_MAPPING.keys()


@pytest.mark.skipif("qwen3_5" not in FAMILIES, reason="an old transformers")
def test_layers_of_an_unknown_kind():
    """Neither attention nor a known recurrent part: a mask would not reach it, and no state is known to forget."""
    target = model("qwen3_5", "sdpa")
    layer = target.get_decoder().layers[1]
    part = layer.linear_attn
    del layer.linear_attn
    layer.mixer = part
    try:
        with refused("Qwen3_5DecoderLayer of the decoder has neither"):
            PRE(target).__enter__()
    finally:
        layer.linear_attn = part
        del layer.mixer


def test_processors_that_need_torchvision(tmp_path, monkeypatch):
    def missing(name, **options):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library but it was not found")

    FAMILIES["qwen2_vl"].make().save_pretrained(tmp_path)
    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", missing)
    with refused("needs torchvision, which is not installed: install"):
        models.load(str(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_forwards(name):
    target, tiny = model(name, "sdpa"), FAMILIES[name]
    inputs = tiny.inputs([["image", 5, 6, 7]])
    with PRE(target):
        with refused("a .static. cache cannot"):
            target.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        static = hf.StaticCache(config=target.config.get_text_config(), max_cache_len=99)
        with refused("DynamicCache"):
            target(**inputs, past_key_values=static)
        if name not in ("llama4", "ovis2", "granite4_vision"):  # the stock classes cannot either, pruned or not
            with refused("whole images|inside the pruning context"):
                target.generate(**inputs, max_new_tokens=2, prefill_chunk_size=5)
        with refused("input_ids"):
            target(inputs_embeds=torch.zeros(1, 5, target.get_input_embeddings().weight.shape[1]))
        with refused("one schedule"), PRE(target):
            pass
        inputs = tiny.inputs([[5, "image"]])
        if inputs["input_ids"][0, -1] == IMAGE:  # others end an image with a word
            with refused("text after the image"):
                target(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, tiny in FAMILIES.items() if not tiny.resizes])
def test_downsampling_and_remembering(name):
    target, inputs = model(name, "sdpa"), FAMILIES[name].inputs([["image", 5]])
    with Schedule([Stage(0, 4, Downsample())])(target), refused("at another size: use|no .* image shrinks to"):
        target(**inputs)
    if not models.family(target).tower_rows:
        with refused("encode them once with get_image_features"), remember(target):
            pass


WHOLE = {"deepseek_vl", "gemma3", "llava", "mistral3", "paligemma", "video_llava", "vipllava"}
CUT = {"aya_vision", "cohere2_vision", "idefics3", "internvl", "llama4", "ovis2", "smolvlm"}
"""Families whose tower takes an image as one picture: always, or unless it is cut into crops."""


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_structure_of_what_is_no_picture(name):
    target, plan = model(name, "sdpa"), Schedule([Stage(1, 4, METHODS["s2prune"]())])
    for word in "image", "large":
        inputs = FAMILIES[name].inputs([["image", 5, word, 6]])
        works = name in WHOLE or (name in CUT and word == "image")
        with plan(target) as pruning, nullcontext() if works else refused("use nuwa"):
            target(**inputs)
            assert [len(stages[-1]) for stages in pruning.kept] == [4, 4]


@torch.no_grad()
def test_videos_whose_frames_are_averaged():
    target, pixels = model("kimi_k25", "sdpa"), torch.zeros(16, 3, 4, 4)
    ids = torch.tensor([[VIDEO] * 4 + [5]])
    with PRE(target), refused("videos of kimi_k25 are not supported.*use images"):
        target(input_ids=ids, pixel_values_videos=pixels, video_grid_thw=torch.tensor([[1, 4, 4]]))


def test_families_that_need_a_newer_transformers(monkeypatch):
    monkeypatch.setattr(models.registry, "version", lambda _: "5.18.0")
    with refused("vipllava needs transformers 5.23, this is 5.18.0: use a newer one"):
        models.registry.family_of_config(hf.VipLlavaConfig())


@pytest.mark.skipif("gemma4_unified" not in FAMILIES, reason="it needs a newer transformers")
def test_unified_gemma4_with_shared_layers():
    config = hf.Gemma4UnifiedConfig(text_config={"num_kv_shared_layers": 2})
    with refused("gemma4_unified whose layers share keys and values is not supported; use gemma4"):
        models.registry.family_of_config(config)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_vl"])
def test_images_of_unknown_size(name):
    """Encoded outside of the context, neither crops nor grids are known."""
    target, inputs = model(name, "sdpa"), FAMILIES[name].inputs([["image", 5]])
    sizes = {key: inputs[key] for key in ("image_sizes", "image_grid_thw") if key in inputs}
    encoded = {"image": target.model.get_image_features(inputs["pixel_values"], **sizes, return_dict=True)}
    given = {"input_ids": inputs["input_ids"], "mm_encoder_outputs": encoded}
    with PRE(target), refused("inside the pruning context"):
        target(**given)
    with PRE(target) as pruning:
        encoded["image"] = target.model.get_image_features(inputs["pixel_values"], **sizes, return_dict=True)
        target(**given)
    assert len(pruning.kept) == 1


@pytest.mark.parametrize(
    ("device", "attention", "instead"),
    [
        ("cpu", "flash_attention_2", "'sdpa' or 'eager'"),
        ("cpu", "flex_attention", "'sdpa' or 'eager'"),
        ("cuda", "flash_attention_2", "'sdpa' or 'eager' or 'flex_attention'"),
        ("cuda", "flex_attention", None),
    ],
)
def test_attention_kernels(device, attention, instead, monkeypatch):
    target = FAMILIES["llava_next"].make()
    monkeypatch.setattr(type(target), "device", torch.device(device))
    target.get_decoder().config._attn_implementation = attention
    if instead is None:
        PRE(target)
        return
    with refused(f"'{attention}' is not supported on {device}: load the model with attn_implementation={instead}$"):
        PRE(target)


def test_a_model_on_several_devices():
    """What accelerate keeps on the CPU or a disk beside a GPU is brought to that GPU to be used."""
    target = FAMILIES["llava_next"].make()
    for placed in ({"": "cpu"}, {"": 0}, {"vision_tower": 0, "language_model": "cpu", "lm_head": "disk"}):
        target.hf_device_map = placed
        PRE(target)
    target.hf_device_map = {"vision_tower": 0, "language_model": 1, "lm_head": "cpu"}
    with refused(r"lies on several devices \(0, 1\), and pruning works on one: load it on one"):
        PRE(target)


def test_a_preset_that_renumbers_says_how_to_keep_positions():
    target = model("qwen2_vl", "sdpa")
    schedule = Schedule.for_model(target, "pyramiddrop")
    with pytest.raises(CodebookError, match=r"positions of qwen2_vl .* '; positions=keep' behind .* a preset's name"):
        schedule(target)
    Schedule.for_model(target, "pyramiddrop; positions=keep")(target)
