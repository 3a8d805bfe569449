"""Qwen models in vLLM, pruned, against transformers with the same schedule; their own environment: `make test-vllm`.

vLLM's engine for CPUs never asks for the positions of pruned images, so the product refuses it. Four lines of `engine`
make it ask, as engines for GPUs do.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from codebook import Codebook, Schedule
from codebook.errors import CodebookError
from codebook.models import fingerprint
from codebook.pruning.methods import Uniform
from codebook.pruning.tokens import VisualTokens
from tests.integrations.vllm import folders, running
from tests.tiny import IMAGE

vllm = pytest.importorskip("vllm")

from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.multimodal.inputs import MultiModalFeatureSpec  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # noqa: E402
from vllm.v1.worker.gpu.model_states.mm_pruning import maybe_create_mm_pruner  # noqa: E402

from codebook.integrations.vllm import mrope, register  # noqa: E402
from codebook.integrations.vllm.settings import VllmSettings  # noqa: E402

register()
torch._dynamo.config.disable = True  # compiling vLLM's sampler takes longer than all that is tested
METHODS = ["codebook", "codebook-farthest", "farthest", "divprune", "uniform"]
KEEP, NEW, BLOCK = 0.3, 8, 32
SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"


def picture(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


TALL, WIDE, SMALL, SQUARE = picture(40, 240, 0), picture(240, 40, 1), picture(64, 64, 2), picture(96, 96, 3)
"""5 x 30 and 30 x 5 tokens, of which 45 stay; 8 x 8, of which 19; 12 x 12, of which 43."""
PROMPTS = [
    (f"w5 w6 {SHOWN} w9 w11", [TALL]),
    (f"{SHOWN} w19 w21 w33", [WIDE]),
    (f"w40 {SHOWN} w41 {SHOWN} w42", [TALL, SMALL]),
    (f"w7 {SHOWN} {SHOWN} w8 w10", [SQUARE, WIDE]),
    ("w4 w5 w6 w17", []),
]


@dataclass
class Engine:
    """A tiny model in vLLM, and in transformers."""

    llm: Any
    stock: Any
    processor: Any
    book: str

    def switch(self, method, keep=KEEP):
        """Prune by other settings from now on, without a new engine."""
        given = {"method": method, "keep": keep}
        if method.startswith("codebook"):
            given["codebook"] = self.book
        self.config.codebook_config = given
        settings = self.input_processor.settings = VllmSettings.read(self.config)
        self.llm.apply_model(lambda model: setattr(model, "settings", settings))
        self.llm.reset_prefix_cache()

    @property
    def config(self):
        return self.llm.llm_engine.model_config.hf_config

    @property
    def input_processor(self):
        return self.llm.llm_engine.renderer.mm_processor

    @property
    def core(self):
        return self.llm.llm_engine.engine_core.engine_core

    @contextmanager
    def chunks(self, size):
        scheduler = self.core.scheduler
        before, scheduler.max_num_scheduled_tokens = scheduler.max_num_scheduled_tokens, size
        yield
        scheduler.max_num_scheduled_tokens = before

    def answers(self, prompts):
        """For each prompt its new tokens, their log-probabilities, and how many tokens of it were cached."""
        given = [{"prompt": text, "multi_modal_data": {"image": images}} if images else {"prompt": text}
                 for text, images in prompts]  # fmt: skip
        wanted = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0, detokenize=False)
        for out in self.llm.generate(given, wanted, use_tqdm=False):
            ids, [*logs] = out.outputs[0].token_ids, out.outputs[0].logprobs
            logs = [step[token].logprob for step, token in zip(logs, ids, strict=True)]
            yield list(ids), torch.tensor(logs), out.num_cached_tokens

    def expected(self, prompts, method):
        """The same by transformers and the library's schedule, each prompt alone."""
        book = Codebook.load(self.book) if method.startswith("codebook") else None
        schedule = Schedule.parse(f"{method}:{KEEP};positions=keep", book)
        for text, images in prompts:
            inputs = self.processor(images=images or None, text=text, return_tensors="pt")
            with schedule(self.stock):
                out = self.stock.generate(
                    **inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
                    output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
            ids = out.sequences[0, inputs["input_ids"].shape[1] :]
            logs = torch.cat(out.logits).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            yield ids.tolist(), logs

    def check(self, found, prompts, method):
        for (ids, logs, *_), (wanted, exact) in zip(found, self.expected(prompts, method), strict=True):
            assert ids == wanted
            torch.testing.assert_close(logs, exact, atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def engine(request, tmp_path_factory):
    folder = folders.save(getattr(folders, request.param), tmp_path_factory.mktemp("model"))
    stock = hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    book = str(tmp_path_factory.mktemp("book"))
    prototypes = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    Codebook(prototypes, None, {"model": request.param, "fingerprint": fingerprint(stock)}).save(book)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mrope, "current_platform", SimpleNamespace(is_cpu=lambda: False))
        load = CPUModelRunner.load_model

        def load_and_ask(runner, **options):
            load(runner, **options)
            runner.is_multimodal_pruning_enabled = True

        patch.setattr(CPUModelRunner, "load_model", load_and_ask)
        given = {"method": "codebook", "keep": KEEP, "codebook": book}
        options = {"enable_prefix_caching": True, "block_size": BLOCK, "max_num_batched_tokens": 512}
        with running.engine(folder, request.param, given, max_model_len=512, **options) as llm:
            yield Engine(llm, stock, hf.AutoProcessor.from_pretrained(folder), book)


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_transformers(engine, method):
    engine.switch(method)
    engine.check(list(engine.answers(PROMPTS)), PROMPTS, method)
    engine.llm.reset_prefix_cache()
    with engine.chunks(32):
        engine.check(list(engine.answers(PROMPTS)), PROMPTS, method)


@pytest.mark.parametrize(
    ("text", "images", "cached"),
    [
        (f"w5 w6 {SHOWN} w9", [TALL], 1),  # of 3 + 45 tokens
        (f"w5 w6 {SHOWN} {' '.join(['w9'] * 20)}", [SMALL], 1),  # of 3 + 19 tokens and 20 more
        (f"w5 w6 {SHOWN} w9 {SHOWN} w12", [SMALL, TALL], 2),  # the second, of 3 + 19 + 3 + 45
    ],
    ids=["cut", "covered", "the second cut"],
)
def test_a_prompt_of_which_blocks_are_cached(engine, text, images, cached):
    engine.switch("divprune")
    first, second = (f"{text} w30 w31", images), (f"{text} w60 w61 w62", images)
    [alone] = engine.answers([second])
    engine.llm.reset_prefix_cache()
    [_] = engine.answers([first])
    [again] = engine.answers([second])
    assert (alone[2], again[2]) == (0, cached * BLOCK)
    assert again[0] == alone[0]
    torch.testing.assert_close(again[1], alone[1], atol=1e-5, rtol=0)
    engine.check([again], [second], "divprune")


def hashes(engine, **options):
    processor = engine.input_processor
    return processor(f"w5 {SHOWN} w6", processor.info.parse_mm_data({"image": SMALL}), **options)["mm_hashes"]["image"]


def test_images_have_other_names_where_other_tokens_are_kept(engine):
    names = []
    for method, keep in [("uniform", 0.3), ("uniform", 0.5), ("farthest", 0.3), ("codebook", 0.3)]:
        engine.switch(method, keep)
        names += hashes(engine) + hashes(engine, mm_uuid_items={"image": ["mine"]})
    assert len(set(names)) == 8
    assert hashes(engine) == names[-2:-1]


def test_memory_is_measured_on_the_largest_image(engine):
    engine.switch("uniform")
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    assert runner.mm_budget.mm_max_toks_per_item == {"image": round(KEEP * 300)}
    shapes = []
    stock = runner.model.embed_multimodal
    runner.model.embed_multimodal = lambda **data: [shapes.append(out.shape) or out for out in stock(**data)]
    runner.profile_run()
    engine.core.reset_encoder_cache()  # it is empty now, and the scheduler has to know
    del runner.model.embed_multimodal
    assert {shape[0] for shape in shapes} == {round(KEEP * 300)}


@pytest.mark.parametrize(
    ("text", "images", "words"),
    [(f"w5 {SHOWN}", [SMALL], "ends with an image"), (f"w5 {SHOWN} <|image_pad|> w6", [SMALL], "more image tokens")],
)
def test_prompts_of_unknown_positions_are_refused(engine, text, images, words):
    if words.startswith("ends"):
        text = text.removesuffix("<|vision_end|>")
    with pytest.raises(VLLMValidationError, match=words):
        list(engine.answers([(text, images)]))


def test_an_image_smaller_than_what_is_to_stay_is_refused(engine):
    engine.switch("uniform", 100)
    with pytest.raises(VLLMValidationError, match="cannot keep 100 tokens of an image that has 64"):
        list(engine.answers([(f"w5 {SHOWN} w6", [SMALL])]))


@pytest.mark.parametrize("keep", [KEEP, 45])
def test_images_that_reach_further_than_the_model_are_refused(engine, monkeypatch, keep):
    """Of a prompt of 512 tokens and an image of up to 152 or 300 tokens, which may stand in one row."""
    engine.switch("uniform", keep)
    text = engine.config.get_text_config()
    monkeypatch.setattr(text, "max_position_embeddings", (512 + 301) // 4 + 1)
    assert list(engine.answers([(f"w5 {SHOWN} w6", [TALL])]))
    monkeypatch.setattr(text, "max_position_embeddings", (512 + 150) // 4)
    with pytest.raises(VLLMValidationError, match="show fewer of them"):
        list(engine.answers([(f"w5 {SHOWN} w6", [TALL])]))


def test_the_newer_runner_of_gpus_gives_the_same_positions(engine):
    """It hands over ids and positions on the device, and asks for the chunks that hold an image alone."""
    engine.switch("uniform")
    processor = engine.input_processor
    text, images = PROMPTS[2]
    given = processor(text, processor.info.parse_mm_data({"image": images}))
    ids, items = given["prompt_token_ids"], given["mm_kwargs"]["image"]
    features = [
        MultiModalFeatureSpec(item, "image", name, where)
        for item, name, where in zip(items, given["mm_hashes"]["image"], given["mm_placeholders"]["image"], strict=True)
    ]
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    model = runner.model
    encoded = [model.embed_multimodal(**{k: v[None] if k.endswith("thw") else v for k, v in item.get_data().items()})[0]
               for item in items]  # fmt: skip
    positions, _ = model.get_mrope_input_positions(ids, features)
    state = SimpleNamespace(
        read_prefill_positions=lambda request, length: state.positions.int(),
        update_prefill_positions=lambda request, new, ahead: vars(state).update(positions=new, ahead=ahead),
        positions=positions,
    )
    pruner = maybe_create_mm_pruner(runner.model_config, model, state, SimpleNamespace(mm_features={"a": features}))
    for start in range(0, len(ids), 10):
        end = min(start + 10, len(ids))
        batch = SimpleNamespace(
            req_ids=["a"], idx_mapping_np=np.array([0]), prefill_len_np=np.array([len(ids)]),
            num_computed_prefill_tokens_np=np.array([start]), num_scheduled_tokens=np.array([end - start]),
        )  # fmt: skip
        parts = [
            whole[max(0, start - feature.mm_position.offset) : max(0, end - feature.mm_position.offset)]
            for whole, feature in zip(encoded, features, strict=True)
        ]
        parts = [part for part in parts if len(part)]
        requests = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=torch.tensor([ids], dtype=torch.int32)))
        for part, clean in zip(parts, pruner.recompute(parts, batch, requests) if parts else [], strict=True):
            assert clean.shape == (len(part), part.shape[1] - 4) and torch.equal(clean, part[:, :-4])
    whole = engine.processor(images=images, text=text, return_tensors="pt")
    kinds = {name: whole[name] for name in ("mm_token_type_ids", "image_grid_thw")}
    exact, ahead = engine.stock.base_model.get_rope_index(whole["input_ids"], **kinds)
    kept, place = torch.ones_like(whole["input_ids"][0], dtype=torch.bool), 0
    for rows, cols in ((30, 5), (8, 8)):
        place = place + (whole["input_ids"][0, place:] == IMAGE).int().argmax()
        kept[place : place + rows * cols] = False
        kept[place + evenly(rows, cols)] = True
        place += rows * cols
    assert torch.equal(state.positions, exact[:, 0, kept])
    assert state.ahead == int(ahead) + whole["input_ids"].shape[1] - len(ids)


def evenly(rows, cols):
    one = VisualTokens.of(torch.zeros(rows * cols, 1))
    return Uniform().select(replace(one, grid=(rows, cols)), round(KEEP * rows * cols))


def wanted(**changes):
    multimodal = SimpleNamespace(video_pruning_rate=changes.pop("video_pruning_rate", None))
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=changes.pop("pipeline", 1)),
        speculative_config=changes.pop("speculative", None),
        model_config=SimpleNamespace(
            enable_prompt_embeds=changes.pop("embeds", False), get_multimodal_config=lambda: multimodal
        ),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pipeline": 2}, "under pipeline parallelism: use --tensor-parallel-size"),
        ({"speculative": object()}, "leave --speculative-config out"),
        ({"embeds": True}, "leave --enable-prompt-embeds out"),
        ({"video_pruning_rate": 0.5}, "leave --video-pruning-rate out"),
    ],
)
def test_where_positions_would_be_wrong_it_does_not_start(monkeypatch, changes, words):
    monkeypatch.setattr(mrope, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    mrope.check(wanted())
    with pytest.raises(CodebookError, match=words):
        mrope.check(wanted(**changes))


def test_an_engine_on_a_cpu_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(mrope, "current_platform", current_platform)
    folder = folders.save(folders.qwen2_vl, tmp_path)
    refused = pytest.raises(CodebookError, match="wrong positions on a CPU: use a GPU")
    with refused, running.engine(folder, "qwen2_vl", {"method": "uniform", "keep": KEEP}):
        pass
    cleanup_dist_env_and_memory()
