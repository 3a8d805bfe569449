"""Families: what is accepted, what is refused, and fingerprints that survive half precision."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, MllamaConfig

from codebook import models
from codebook.errors import CodebookError
from codebook.inference.overlay import overlay
from tests.tiny import IMAGE, SIDE, llava


def test_fingerprint_is_the_weights_whatever_their_type():
    family = models.family(llava())
    one = family.fingerprint(llava())
    for dtype in (torch.float16, torch.bfloat16):
        assert family.same_fingerprint(one, family.fingerprint(llava().to(dtype)))
    assert not family.same_fingerprint(one, family.fingerprint(llava(seed=1)))
    changed = llava()
    changed.model.multi_modal_projector.linear_2.weight.data.mul_(1.1)
    assert not family.same_fingerprint(one, family.fingerprint(changed))
    assert not family.same_fingerprint(one, "garbage") and not family.same_fingerprint(one, "")


@torch.no_grad()
def test_image_features_are_what_enters_the_llm():
    model, pixels = llava(), torch.randn(2, 3, SIDE * 4, SIDE * 4)
    projected, patches, cls = models.family(model).image_features(model, pixels)
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(cls, hidden[:, 0]) and torch.equal(patches, hidden[:, 1:])
    assert torch.allclose(model.model.multi_modal_projector(patches), projected)


def test_images_are_found_in_prompts():
    model, n = llava(), SIDE * SIDE
    prompt = [5, *[IMAGE] * n, 6, 7, *[IMAGE] * (2 * n), 8]
    [images] = models.family(model).images(model, [prompt], {"image": None})
    assert [(i.columns[0], i.count) for i in images] == [(1, n), (n + 3, n), (2 * n + 3, n)]
    with pytest.raises(CodebookError, match="whole images"):
        models.family(model).images(model, [[5, *[IMAGE] * (n - 1), 6]], {"image": None})


def test_unsupported_families_are_refused_before_their_weights_are_read(tmp_path):
    MllamaConfig().save_pretrained(tmp_path)
    with pytest.raises(CodebookError, match=r"mllama cross-attend to their images.*; use"):
        models.load(str(tmp_path))


def test_variants_that_would_go_wrong_are_refused():
    model = llava()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(CodebookError, match="'full'"):
        models.family(model)


@pytest.mark.parametrize("name", ["no/such-model-anywhere", "."])
def test_models_that_cannot_be_loaded(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CodebookError) as caught:
        models.load(name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_saved_model_loads_from_its_folder(tmp_path):
    model = llava()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    family = models.family(again)
    assert family.same_fingerprint(family.fingerprint(model), family.fingerprint(again))


def test_overlay_shows_kept_tokens_bright_and_framed():
    picture = overlay(Image.new("RGB", (96, 96), "white"), [0, 13], (12, 12))
    width = (picture.width - 16) // 2
    patch = width // 12

    def at(row, col, dx=0.5, dy=0.5):
        return picture.getpixel((int(width + 16 + (col + dx) * patch), int((row + dy) * patch)))

    assert at(0, 0) == at(1, 1) == (255, 255, 255)
    assert max(at(0, 1)) < 90 and max(at(5, 5)) < 90
    assert at(1, 1, 0.0, 0.5) == (255, 196, 0)
