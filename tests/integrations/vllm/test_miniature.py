"""The miniature in vLLM: what transformers answers under the same schedule, token by token."""

import json

import pytest
import torch
from safetensors.torch import save_file

from codebook import load
from tests.integrations.vllm.running import MINIATURE, ask, engine, expected, needs_vllm, questions, settings

pytestmark = needs_vllm
METHODS = ("codebook", "codebook-farthest", "codebook-middle", "farthest", "divprune", "uniform", "random", "phi-knn")
KEEP = 0.2


@pytest.fixture(scope="module")
def transformers():
    return load("miniature", "cpu")


@pytest.fixture(scope="module")
def prompts(transformers):
    return questions(transformers[1])


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_transformers(transformers, prompts, method):
    """33 prompts, 11 of them with several images, batched as vLLM likes.

    Random draws by an image's pixels alone: transformers' choice where the image is the prompt's first.
    """
    given = settings(method, KEEP)
    if method == "random":
        prompts = [(text, images) for text, images in prompts if len(images) == 1]
    assert len(prompts) == (22 if method == "random" else 33)
    with engine(MINIATURE, "llava", given) as llm:
        found = ask(llm, prompts)
    assert found == expected(*transformers, prompts, given)


def hits(llm):
    """Tokens that were found in the prefix cache so far."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits")


def test_chunks_and_cached_prefixes_change_nothing(transformers, prompts):
    """Chunks of 32 tokens cut images; the second time, and with another question, prefixes come from the cache."""
    given = settings("codebook-farthest", 0.5)
    others = [(text.replace("?", " ?").replace("red", "blue"), images) for text, images in prompts]
    wanted, other = (expected(*transformers, some, given) for some in (prompts, others))
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 32, "enable_chunked_prefill": True}
    with engine(MINIATURE, "llava", given, block_size=32, **options) as llm:
        assert ask(llm, prompts) == wanted
        before = hits(llm)
        assert ask(llm, prompts) == wanted
        again = hits(llm)
        assert ask(llm, others) == other
        assert again - before >= 33 * 32 and hits(llm) > again


def test_requests_that_give_way_and_begin_again_change_nothing(prompts):
    """A cache of ten blocks, of which each answer takes four: what is computed of some is thrown away in between."""
    from vllm import SamplingParams

    asked = [{"prompt": text, "multi_modal_data": {"image": images}} for text, images in prompts if len(images) == 1]
    length = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    options = {"num_gpu_blocks_override": 11, "block_size": 32, "max_model_len": 320}
    with engine(MINIATURE, "llava", settings("codebook-farthest", 0.5), **options) as llm:

        def answers(some):
            return [list(one.outputs[0].token_ids) for one in llm.generate(some, length, use_tqdm=False)]

        def given_way():
            return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")

        alone = [answers([one])[0] for one in asked[:8]]
        assert not given_way()
        assert answers(asked[:8]) == alone and given_way()


def test_adapters_of_the_language_model_are_applied(prompts, tmp_path):
    """As transformers with the adapter's change in its weights; what is cached without it is not taken with it."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    given, some = settings("codebook-farthest", 0.5), prompts[::4]
    model, processor = load("miniature", "cpu")
    plain = expected(model, processor, some, given)
    draw, tensors, targets = torch.Generator().manual_seed(0), {}, ("q_proj", "v_proj", "down_proj")
    for name, module in model.named_modules():
        if ".language_model." in name and name.endswith(targets):
            down = torch.randn(4, module.in_features, generator=draw) * 0.3
            up = torch.randn(module.out_features, 4, generator=draw) * 0.1
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            module.weight.data += up @ down
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": targets, "bias": "none"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapted = expected(model, processor, some, given)
    assert adapted != plain
    asked = [{"prompt": text, "multi_modal_data": {"image": images}} for text, images in some]
    options = {"enable_lora": True, "max_lora_rank": 8, "enable_prefix_caching": True, "block_size": 32}
    with engine(MINIATURE, "llava", given, **options) as llm:
        for adapter, wanted in ((None, plain), (LoRARequest("a", 1, str(tmp_path)), adapted)) * 2:
            found = llm.generate(
                asked, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False, lora_request=adapter
            )
            assert [list(one.outputs[0].token_ids) for one in found] == wanted


def test_a_prefix_that_ends_within_an_image_is_continued_right(transformers, prompts):
    """Blocks of 32 tokens in images of 72, so that what is cached of a prompt ends inside its last image."""
    given = settings("divprune", 0.5)
    several = [(text, images) for text, images in prompts if len(images) > 1]
    cut = [(text[: text.rindex("<image>")] + "<image><assistant>", images) for text, images in several]
    with engine(MINIATURE, "llava", given, block_size=32, enable_prefix_caching=True) as llm:
        assert ask(llm, cut) == expected(*transformers, cut, given)
        before = hits(llm)
        assert ask(llm, several) == expected(*transformers, several, given)
        shared = [1 + 1 + 72 * len(images) for _, images in several]
        assert hits(llm) - before == sum(length // 32 * 32 for length in shared)
        assert all(length // 32 * 32 < length for length in shared)
