"""What happens before a prompt: vLLM's inspection, refused starts, and the names of images."""

import json
from pathlib import Path

import pytest
from PIL import Image

from codebook import Codebook
from codebook.errors import CodebookError
from codebook.integrations.vllm import ARCHITECTURES
from tests.integrations.vllm.running import (
    BOOK,
    MINIATURE,
    ask,
    engine,
    needs_vllm,
    overrides,
    questions,
    settings,
)

pytestmark = needs_vllm


@pytest.fixture(scope="module", autouse=True)
def registered():
    from codebook.integrations.vllm import register

    register()


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_vllm_inspects_every_class_in_a_process_of_its_own(family, monkeypatch, tmp_path):
    from vllm.model_executor.models.registry import ModelRegistry

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))  # nothing that was inspected before
    found = ModelRegistry.models[ARCHITECTURES[family][1]].inspect_model_cls()
    assert found.architecture == ARCHITECTURES[family][1]
    assert found.supports_multimodal and found.supports_pp and found.is_text_generation_model
    assert list(tmp_path.rglob("*.json"))


def processor(given, family="llava", folder=MINIATURE, **options):
    """vLLM's processor of a model, the miniature if none is named, under these settings."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = EngineArgs(str(folder), hf_overrides=overrides(family, given), **options).create_model_config()
    return MULTIMODAL_REGISTRY.create_processor(config)


def hashes(made, uuid=None):
    items = made.info.parse_mm_data({"image": [Image.new("RGB", (96, 96), "red")]})
    own = None if uuid is None else made.info.parse_mm_uuids({"image": [uuid]}) if hasattr(
        made.info, "parse_mm_uuids") else {"image": [uuid]}  # fmt: skip
    return made("<s><user><image><assistant>", items, own)["mm_hashes"]["image"]


def test_an_images_name_says_what_is_kept_of_it(tmp_path):
    book = Codebook.load(BOOK)
    Codebook(book.prototypes[1:].clone(), book.provenance[1:], {"model": "miniature"}).save(tmp_path)
    kinds = [
        settings("codebook", 0.2), settings("codebook", 0.5), settings("codebook", 20), settings("uniform", 0.2),
        settings("codebook-farthest", 0.2), settings("codebook", 0.2) | {"codebook": str(tmp_path)},
    ]  # fmt: skip
    for uuid in (None, "mine"):
        found = [name for given in kinds for name in hashes(processor(given), uuid)]
        assert len(set(found)) == len(kinds)
        assert hashes(processor(kinds[0]), uuid) == found[:1]


def blocks(given, prompts):
    """The names of the blocks that an engine has cached after it answered."""
    with engine(MINIATURE, "llava", given, enable_prefix_caching=True, block_size=32) as llm:
        ask(llm, prompts, 4)
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        return set(pool.cached_block_hash_to_block._cache)


def test_engines_that_keep_other_tokens_share_no_block(monkeypatch):
    """In a store that both use a block is found by its name alone."""
    from transformers import AutoProcessor

    monkeypatch.setenv("PYTHONHASHSEED", "0")  # without it every engine has names of its own
    prompts = questions(AutoProcessor.from_pretrained(MINIATURE), 3)
    first, same, other = (blocks(settings("divprune", keep), prompts) for keep in (0.5, 0.5, 0.45))
    assert first and first == same
    assert other and not first & other


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llava", {"size": {"height": 8, "width": 8}}),
        ("llava_next", {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}),
        ("llava_onevision", {"size": {"height": 8, "width": 8}}),
        ("qwen2_vl", {"patch_size": 8}),
        ("qwen3_vl", {"temporal_patch_size": 4}),
    ],
)
def test_a_request_whose_pixels_the_tower_does_not_take_is_refused(tmp_path, family, changes):
    """In the model they would end the engine, for all requests: clients can send `mm_processor_kwargs`."""
    from vllm.exceptions import VLLMValidationError

    from tests.integrations.vllm import folders

    folder = MINIATURE if family == "llava" else folders.save(getattr(folders, family), tmp_path)
    made, image = processor({"method": "uniform", "keep": 0.5}, family, folder), Image.new("RGB", (40, 24))
    token = "<|vision_start|> <|image_pad|> <|vision_end|>" if family.startswith("qwen") else "<image>"
    text = "<s><user><image><assistant>" if family == "llava" else f"w20 {token} w21"

    def given(**options):
        return made(text, made.info.parse_mm_data({"image": [image]}), None, options)["mm_placeholders"]["image"]

    assert given() == given(do_rescale=False)
    with pytest.raises(VLLMValidationError, match="leave out what changes its size or its patches"):
        given(**changes)


REFUSED = [
    ({}, "lacks 'method'"),
    (None, "has no codebook_config"),
    ({"method": "uniform", "keep": 0.2, "budget": 1}, "unknown key 'budget'"),
    ({"method": "farthest+mass", "keep": 0.2}, "mass-preserving"),
    ({"method": "fastv", "keep": 0.2}, "attention"),
    ({"method": "codebook", "keep": 0.2}, "lacks 'codebook'"),
    ({"method": "codebook", "keep": 0.2, "codebook": str(Path(BOOK).parent / "eyes")}, "dimension 576"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_settings_stop_the_start(given, words):
    from vllm import LLM

    changed = overrides("llava", given) if given is not None else {"architectures": [ARCHITECTURES["llava"][1]]}
    with pytest.raises(CodebookError, match=words):
        LLM(MINIATURE, dtype="float32", enforce_eager=True, max_model_len=1024, hf_overrides=changed)


def test_embeddings_in_the_place_of_images_are_refused():
    with pytest.raises(CodebookError, match="--enable-mm-embeds"):
        processor(settings("uniform", 0.2), enable_mm_embeds=True)


def test_adapters_of_the_tower_are_refused():
    """vLLM itself would ignore them, with a warning."""
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"enable_lora": True, "enable_tower_connector_lora": True}
    refused = pytest.raises(CodebookError, match="leave --enable-tower-connector-lora out")
    with refused, engine(MINIATURE, "llava", settings("uniform", 0.2), **options):
        pass
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_no_graph_of_a_tower_is_replayed(family, monkeypatch):
    """Whichever of vLLM's classes can record one: what is recorded passes the pruning by."""
    from dataclasses import dataclass

    from codebook.integrations import vllm as plugin

    @dataclass
    class Recorded:
        modalities: list[str]

    from codebook.integrations.vllm.pruned import PruningModel

    made = getattr(plugin, ARCHITECTURES[family][1])
    own = made.__mro__[made.__mro__.index(PruningModel) + 1]
    monkeypatch.setattr(own, "get_encoder_cudagraph_config", lambda _: Recorded(["image"]), raising=False)
    assert made.get_encoder_cudagraph_config(object.__new__(made)).modalities == []


def test_a_codebook_of_other_weights_stops_the_start(tmp_path):
    from vllm.distributed import cleanup_dist_env_and_memory

    book = Codebook.load(BOOK)
    config = json.loads((Path(BOOK) / "config.json").read_text())
    own = config["fingerprint"]
    config["fingerprint"] = own[:-4] + ("4000" if own[-4:] != "4000" else "3f80")
    Codebook(book.prototypes, book.provenance, config).save(tmp_path)
    given = settings("codebook", 0.2) | {"codebook": str(tmp_path)}
    with pytest.raises(CodebookError, match="another tower or projector"), engine(MINIATURE, "llava", given):
        pass
    cleanup_dist_env_and_memory()


def test_a_codebook_that_was_not_compared_with_the_weights_chooses_nothing():
    """As of formats that fill the model past its own loading. Engines for GPUs, which try an image, do not start."""
    from transformers import AutoProcessor

    prompts = questions(AutoProcessor.from_pretrained(MINIATURE), 1)[:1]
    refused = pytest.raises(CodebookError, match="use a method without a codebook")
    with engine(MINIATURE, "llava", settings("codebook", 0.2), load_format="dummy") as llm, refused:
        ask(llm, prompts)
    with engine(MINIATURE, "llava", settings("farthest", 0.2), load_format="dummy") as llm:
        assert ask(llm, prompts)


def test_videos_are_refused_where_they_would_not_be_pruned(tmp_path):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from tests.integrations.vllm import folders

    for make in (folders.llava_onevision, folders.internvl):
        given = overrides(make.__name__, {"method": "uniform", "keep": 0.2})
        folder = str(folders.save(make, tmp_path / make.__name__))
        config = EngineArgs(folder, hf_overrides=given).create_model_config()
        assert MULTIMODAL_REGISTRY.create_processor(config).info.supported_mm_limits == {"image": None}
