"""The miniature in vLLM: what transformers answers under the same schedule, token by token."""

import pytest

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
