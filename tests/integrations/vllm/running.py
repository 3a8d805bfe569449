"""vLLM as the tests run it: small, in float32 and without compiling; and what transformers answers to the same."""

from __future__ import annotations

import contextlib
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from codebook import Codebook, Schedule, miniature
from codebook.integrations.vllm import ARCHITECTURES

INSTALLED = find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="run by `make test-vllm`")
ROOT = Path(__file__).parents[3]
MINIATURE, BOOK = str(ROOT / "codebook/miniature/weights"), str(ROOT / "indexes/miniature")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
"""Read by vLLM when it is imported; its engine runs in the test's own process."""
if INSTALLED:  # else it would reach tests of other things, in whose process pytest imports this file
    os.environ.update(ENVIRONMENT)


def settings(method, keep, **more):
    """What `codebook_config` says of a method, with the miniature's codebook where it needs one."""
    return {"method": method, "keep": keep} | ({"codebook": BOOK} if method.startswith("codebook") else {}) | more


def overrides(family, given):
    return {"architectures": [ARCHITECTURES[family][1]], "codebook_config": given}


@contextlib.contextmanager
def engine(folder, family, given, **options):
    """vLLM's engine of a model's folder; None as the settings runs vLLM's own class."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    changed = {} if given is None else {"hf_overrides": overrides(family, given)}
    defaults = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8,
        "enable_prefix_caching": False, "limit_mm_per_prompt": {"image": 4}, "disable_log_stats": False,
    }  # fmt: skip
    llm = LLM(str(folder), **defaults | changed | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def ask(llm, prompts, tokens=24):
    """The ids that vLLM answers, greedily, to each (text, images)."""
    from vllm import SamplingParams

    requests = [{"prompt": text, "multi_modal_data": {"image": images}} for text, images in prompts]
    found = llm.generate(requests, SamplingParams(temperature=0, max_tokens=tokens), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


def expected(model, processor, prompts, given, tokens=24):
    """The ids that transformers answers under the same schedule, prompt by prompt."""
    book = Codebook.load(given["codebook"]) if "codebook" in given else None
    schedule = Schedule.parse(f"{given['method']}:{given['keep']}; positions=compact", book)
    found = []
    for text, images in prompts:
        inputs = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
        with schedule(model), torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        found.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def questions(processor, count=11):
    """Prompts of the miniature's test scenes, of one image and of several: (text, images)."""
    asked = [q for family in ("exist", "ocr", "multi") for q in miniature.tasks(family, "test", 0, count)]
    return [(written(processor, q), q.images) for q in asked]


def written(processor, question):
    content = [{"type": "image"} for _ in question.images] + [{"type": "text", "text": question.question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
