"""Granite 4 Vision: empty image tokens, and features that are added before several layers."""

import pytest
import torch
import transformers as hf

from codebook import models
from codebook.building.probes import Prober
from codebook.errors import CodebookError
from codebook.models.registry import family_of_config
from codebook.pruning import DivPrune, Random, Schedule, Stage
from tests.models.cells import model
from tests.models.families import FAMILIES
from tests.tiny import IMAGE

NAME = "granite4_vision"
pytestmark = pytest.mark.skipif(NAME not in FAMILIES, reason="it needs a newer transformers")
ROWS = [["image", 5, 6, 7], [3, "large", 9, "image", 8, 11, 12]]


@torch.no_grad()
def test_pruners_compare_what_enters_the_first_layer():
    """Image tokens have features there, and words are as large as they are there."""
    target, inputs, seen, entered = model(NAME, "sdpa"), FAMILIES[NAME].inputs(ROWS), [], []

    class Look(Random):
        def score(self, tokens):
            seen.append((tokens.features, tokens.words))
            return super().score(tokens)

    layer = target.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    target(**inputs)
    handle.remove()
    with Schedule([Stage(1, 0.5, Look())])(target):
        target(**inputs)
    units = [
        (row, columns)
        for row, grids, places in FAMILIES[NAME].columns(ROWS)
        for columns in places.split([rows * cols for rows, cols in grids])
    ]
    for (features, words), (row, columns) in zip(seen, units, strict=True):
        assert torch.equal(features, entered[0][row, columns]) and features.abs().min() > 0
        assert torch.equal(words[-1], entered[0][row, -1])


@torch.no_grad()
def test_another_picture_in_the_same_prompt_gets_a_choice_of_its_own():
    """Without a cache a generation repeats its choice; prompts are compared with their features."""
    target, inputs, chosen = model(NAME, "sdpa"), FAMILIES[NAME].inputs(ROWS[:1]), []

    class Watch(Random):
        def score(self, tokens):
            chosen.append(tokens.features)
            return super().score(tokens)

    class Ask(hf.LogitsProcessor):
        def __call__(self, ids, scores):
            other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
            if len(chosen) < 4:
                target(**other, use_cache=False)
            return scores

    with Schedule([Stage(0, 0.5, Watch())])(target):
        target.generate(**inputs, max_new_tokens=2, use_cache=False, do_sample=False, logits_processor=[Ask()])
    assert len(chosen) == 4  # of two grids each: once for the generation, once for the other picture


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*device_map keys do not match")
def test_its_images_are_found_where_accelerate_copies_what_encoded_them(tmp_path):
    """Of a decoder on a disk: there is no pooled output, by which those of other families are known."""
    pytest.importorskip("accelerate")
    target, inputs, kept = model(NAME, "sdpa"), FAMILIES[NAME].inputs(ROWS), []
    target.save_pretrained(tmp_path)
    parts = [*dict(target.model.named_children()), *dict(target.model.named_parameters(recurse=False))]
    placed = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu", "model.language_model": "disk"}
    moved = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path, device_map=placed, offload_folder=tmp_path / "disk"
    )
    for own in (target, moved.eval()):
        with Schedule([Stage(0, 0.5, DivPrune())])(own) as pruning:
            own.generate(**inputs, max_new_tokens=1, pad_token_id=0)
        kept.append([stages[0].tolist() for stages in pruning.kept])
    assert any(weight.is_meta for weight in moved.get_decoder().parameters()) and kept[0] == kept[1]


@torch.no_grad()
def test_a_probe_of_the_whole_view_is_the_models_own_answer():
    """Which is never shown a view alone: here it is, by features of which all else is cut off."""
    target, family = model(NAME, "sdpa"), models.family(model(NAME, "sdpa"))
    inputs = FAMILIES[NAME].inputs([["image", 5]])
    out = target.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
    out.deepstack_features = [(layer, [packed[:16] for packed in own]) for layer, own in out.deepstack_features]
    ids = torch.tensor([[23, 24, *[IMAGE] * 16, 25, 26]])
    expected = target(input_ids=ids, mm_encoder_outputs={"image": out}).logits[:, -1]
    projected = family.image_features(target, inputs["pixel_values"])[0]

    def vectors(*ids):
        own = family.words(target, torch.tensor(ids))
        return torch.nn.functional.pad(own, (0, family.width(target) - own.shape[-1]))

    prober = Prober(target, vectors(23, 24)[None], vectors(25, 26)[None], vectors(0), (4, 4))
    answer = prober.answer(projected, (4, 4))
    assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert family.width(target) == 4 * 64  # before layers 0 to 3: two are for one of them, one for none


def test_a_tower_whose_tokens_stay_empty_in_the_first_layer_is_refused():
    config = FAMILIES[NAME].config()
    config.deepstack_layer_map = [(-1, 1)]
    with pytest.raises(CodebookError, match="empty in the first layer is not supported; use one whose deepstack"):
        family_of_config(config)
