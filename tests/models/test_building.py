"""Building in every family: features, what enters the LLM in a probe, and the cascade from end to end."""

import numpy as np
import pytest
import torch
from PIL import Image

from codebook import models
from codebook.building import Pilot, Settings, build
from codebook.building.cascade import survivors
from codebook.building.probes import Prober, jsd, region
from codebook.models import any_size, lfm2_vl
from codebook.models.base import decoder
from codebook.store.codebook import Codebook
from tests.models.cells import model
from tests.models.families import FAMILIES
from tests.models.processors import TinyProcessor
from tests.tiny import IMAGE


@pytest.fixture(params=FAMILIES)
def tiny(request, monkeypatch):
    monkeypatch.setattr(any_size, "VIEW_SIDE", 4)
    monkeypatch.setattr(lfm2_vl, "VIEW_TOKENS", 4)
    return FAMILIES[request.param]


def whole_view(tiny):
    """Pixels of one image as its processor gives them for one view."""
    pixels = tiny.inputs([["image", 5]])["pixel_values"]
    return pixels[:, :1] if tiny.crops else pixels


@torch.no_grad()
def test_features_are_what_enters_the_llm(tiny):
    target, family = model(tiny.name, "sdpa"), models.family(model(tiny.name, "sdpa"))
    inputs, entered = tiny.inputs([["image", 5]]), []
    handle = decoder(target).layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    target(**inputs)
    handle.remove()
    projected, patches, cls = family.image_features(target, inputs["pixel_values"])
    rows, cols = family.grid(target)
    assert projected.shape == (1, rows * cols, family.width(target)) and patches.shape[:2] == (1, rows * cols)
    assert (cls is not None) == family.has_cls(target)
    columns = (inputs["input_ids"][0] == IMAGE).nonzero()[: rows * cols, 0]
    own = projected[0, :, : entered[0].shape[-1]]
    assert torch.allclose(own, entered[0][0, columns], atol=1e-5)


@torch.no_grad()
def test_a_probe_of_the_whole_image_is_the_models_own_answer(tiny):
    if tiny.crops:
        pytest.skip("a codebook is built from the whole view alone, which the model never sees without crops")
    target, family = model(tiny.name, "sdpa"), models.family(model(tiny.name, "sdpa"))
    inputs = tiny.inputs([[3, 4, "image", 5, 6]])
    expected = target(**inputs).logits[:, -1]
    projected = family.image_features(target, inputs["pixel_values"])[0]
    embeds = family.words(target, inputs["input_ids"])
    embeds = torch.nn.functional.pad(embeds, (0, family.width(target) - embeds.shape[-1]))
    columns, grid = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0], family.grid(target)
    gap = columns[grid[1]] - columns[grid[1] - 1] - 1  # between two rows
    row_end = embeds[:, columns[grid[1]] - gap : columns[grid[1]]] if gap else None
    prober = Prober(target, embeds[:, : columns[0]], embeds[:, columns[-1] + 1 :], embeds[0, :1], grid, row_end=row_end)
    answer = prober.answer(projected, grid)
    assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_the_cascade(tiny):
    target, family = model(tiny.name, "sdpa"), models.family(model(tiny.name, "sdpa"))
    embed, width = target.get_input_embeddings(), family.width(target)

    def vectors(*ids):
        own = embed(torch.tensor(ids))
        return torch.nn.functional.pad(own, (0, width - own.shape[-1]))

    grid = family.grid(target)
    prober = Prober(target, vectors(23, 24)[None], vectors(25, 26)[None], vectors(0), grid, 7)
    settings = Settings(prompt="?", candidates="all", tau_p=1.0, tau_j=9.0, max_cluster_size=99)
    found = survivors(whole_view(tiny), target, family, prober, settings)
    assert len(found.features) == grid[0] * grid[1] and found.features.shape[1] == embed.weight.shape[1]
    tokens = family.image_features(target, whole_view(tiny))[0][0]
    ablated = tokens.clone()
    ablated[region(5, grid)] = vectors(0)
    whole, without = (
        family.answer(target, torch.cat([vectors(23, 24), x, vectors(25, 26)])[None], 2, grid)
        for x in (tokens, ablated)
    )
    assert found.tokens[5]["jsd_global"] == pytest.approx(jsd(whole, without).item(), rel=1e-3, abs=1e-9)


@torch.no_grad()
def test_a_picture_becomes_one_view(tiny):
    target, family = model(tiny.name, "sdpa"), models.family(model(tiny.name, "sdpa"))
    pixels = family.view(TinyProcessor(tiny.name), Image.effect_noise((50, 30), 80).convert("RGB"))
    rows, cols = family.grid(target)
    assert family.image_features(target, pixels)[0].shape[:2] == (1, rows * cols)


def test_any_model_is_built_for_without_a_setting(tiny, tmp_path):
    for i in range(4):
        coarse = np.random.default_rng(i).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 48)).save(tmp_path / f"{i}.png")
    target, out = model(tiny.name, "sdpa"), tmp_path / "book"
    images = [tmp_path / f"{i}.png" for i in range(4)]
    book = build(target, TinyProcessor(tiny.name), images, out, model_id="tiny", pilot=Pilot(2))
    Codebook.load(out).check(target)
    assert len(book) == book.config["funnel"]["recurrent"] > 0 and book.config["pilot"]["read"] == 2
