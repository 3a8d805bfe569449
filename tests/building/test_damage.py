"""A model whose outputs are no numbers builds no codebook."""

import pytest
import torch

from codebook import CodebookError, build
from tests.building.tiny import model, processor, settings

PARTS = {
    "tower": "model.vision_tower.encoder.layers.0.mlp.fc1",
    "projector": "model.multi_modal_projector.linear_1",
    "decoder": "model.language_model.layers.1.mlp.down_proj",
    "head": "lm_head",
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_outputs_that_are_no_numbers_are_called_that(part, pictures, tmp_path):
    damaged = model()
    with torch.no_grad():
        damaged.get_submodule(part).weight[0, 0] = torch.nan
    with pytest.raises(CodebookError, match=r"outputs are not numbers \(NaN\)"):
        build(damaged, processor(), pictures, tmp_path / "book", model_id="tiny", settings=settings())
    assert not (tmp_path / "book" / "config.json").exists()
