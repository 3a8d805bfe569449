"""A small LLaVA that reads its image in its first decoder layers only."""

import pytest
import torch

from codebook.miniature import model as miniature_model

LAYERS, READS = 6, 3


@pytest.fixture(scope="session")
def processor():
    return miniature_model.processor()


@pytest.fixture(scope="session")
def model():
    """Random weights on the miniature's vocabulary; layers from READS on attend to nothing, so that they are blind."""
    small = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
    before = dict(miniature_model.TEXT)
    miniature_model.TEXT.update(small)
    try:
        built = miniature_model.model(seed=0).eval()
    finally:
        miniature_model.TEXT.clear()
        miniature_model.TEXT.update(before)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for i, layer in enumerate(built.get_decoder().layers):
            layer.self_attn.o_proj.weight.normal_(std=2.0 if i < READS else 0.0, generator=generator)
            layer.mlp.down_proj.weight.normal_(std=0.1, generator=generator)
        built.lm_head.weight.normal_(std=1.0, generator=generator)
    return built
