"""Tiny models of each family in vLLM: tall, wide and several images, as transformers answers them."""

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from tests.integrations.vllm import folders
from tests.integrations.vllm.running import ask, engine, expected, needs_vllm

pytestmark = needs_vllm
SIZES = ([(40, 20)], [(16, 64)], [(30, 30)], [(90, 20)], [(64, 64)], [(40, 20), (20, 50)], [(64, 64), (31, 30)])
"""Width and height of each prompt's images."""


@pytest.fixture(scope="module")
def prompts():
    generator = np.random.default_rng(0)
    found = []
    for number, sizes in enumerate(SIZES):
        images = [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        found.append((f"<s> w21 {'<image> w22 ' * len(images)}w23 w{24 + number}", images))
    return found


@pytest.mark.parametrize("method", ["divprune", "uniform"])
@pytest.mark.parametrize("processor", [folders.llava_next, folders.llava_onevision, folders.internvl])
def test_tall_wide_and_several_images(tmp_path, prompts, processor, method):
    folder, given = folders.save(processor, tmp_path), {"method": method, "keep": 0.3}
    made = hf.AutoProcessor.from_pretrained(folder)
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with engine(folder, processor.__name__, given) as llm:
        found = ask(llm, prompts, 16)
    assert found == expected(model, made, prompts, given, 16)
