"""Models that also hear: tokens of audio are text to pruning, kept wherever they stand, with the stock positions."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from codebook import CodebookError, models
from codebook.pruning import FastV, Random, Schedule, Stage
from tests import reference
from tests.models.cells import gone_from, model
from tests.models.families import FAMILIES
from tests.models.prompts import AUDIO

SCHEDULE = Schedule([Stage(0, 0.5, Random()), Stage(2, 0.25, FastV())])
OMNI = [name for name in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker") if name in FAMILIES]
ROWS = {
    "beside images": [["audio", 5, "image", 6, "audio", 7], [3, "large", 9, "audio", 8]],
    "beside a video": [[4, "video", 5, "audio", 6], ["image", 9, 8]],
    "in a video": [[4, "film", 5], ["image", 3, "film", 9, 8]],
    "alone": [["audio", 5, 6], [7, 8]],
}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("where", ROWS)
@pytest.mark.parametrize("name", OMNI)
def test_audio_is_kept(name, where, attention):
    target, tiny, rows = model(name, attention), FAMILIES[name], ROWS[where]
    inputs = tiny.inputs(rows) | ({"use_audio_in_video": True} if where == "in a video" else {})
    with SCHEDULE(target) as pruning:
        out = target.generate(
            **inputs, max_new_tokens=2, do_sample=False, suppress_tokens=[*tiny.never], output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    ids, columns = inputs["input_ids"], tiny.columns(rows)
    gone = gone_from(inputs, columns, pruning.kept, SCHEDULE.stages)
    assert (gone[(ids == AUDIO[1])] == 10**6).all() and (where == "alone" or (gone < 10**6).any())
    for (_, grids, places), image in zip(columns, pruning.images, strict=True):
        assert image.columns == tuple(places.tolist())
        assert [(grid.rows, grid.cols) for grid in image.layout.grids] == grids
    said = out.sequences[:, ids.shape[1] :]
    tokens, logits = reference.masked(target, inputs, gone, said, suppress=tiny.never)
    ours = torch.stack(out.logits, 1)
    assert (ours - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert torch.equal(said, tokens)
    # The control: what audio says is heard in the pruned answer.
    louder = inputs | {"input_features": 2 * inputs["input_features"]} if "input_features" in inputs else inputs
    with SCHEDULE(target):
        other = target(**louder).logits[:, -1]
    assert (other - ours[:, 0]).abs().max() > 1e-3 * logits.abs().max() or "input_features" not in inputs


WHOLE = {"qwen2_5_omni_thinker": "Qwen2_5OmniConfig", "qwen3_omni_moe_thinker": "Qwen3OmniMoeConfig"}


@pytest.mark.parametrize("name", OMNI)
def test_of_a_model_that_also_speaks_the_thinker_is_loaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", lambda *_, **__: "processor")
    thinker = FAMILIES[name].make()
    thinker.save_pretrained(tmp_path)
    whole = getattr(hf, WHOLE[name])(thinker_config=thinker.config.to_dict())
    whole.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name.removesuffix("_thinker")
    held = load_file(tmp_path / "model.safetensors")
    held["talker.model.layers.0.mlp.weight"] = torch.zeros(3, 3)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, _ = models.load(str(tmp_path), "cpu")
    assert type(loaded) is type(thinker)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in thinker.state_dict().items())
    with pytest.raises(CodebookError, match=r"also speak.*: pass their `thinker`.*codebook.load loads it alone$"):
        models.registry.family_of_config(whole)
