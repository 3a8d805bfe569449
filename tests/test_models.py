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
    one = models.fingerprint(llava())
    for dtype in (torch.float16, torch.bfloat16):
        assert models.same_fingerprint(one, models.fingerprint(llava().to(dtype)))
    assert not models.same_fingerprint(one, models.fingerprint(llava(seed=1)))
    changed = llava()
    changed.model.multi_modal_projector.linear_2.weight.data.mul_(1.1)
    assert not models.same_fingerprint(one, models.fingerprint(changed))
    for other in ("garbage", "", one[:-1], one.replace("-", "--"), one + ":", one[:-4] + "<e78", one[:-4] + "١٢٣٤"):
        assert not models.same_fingerprint(one, other) and not models.same_fingerprint(other, one), other


class Packed(torch.nn.Module):
    """A quantised linear layer: two weights in a byte, as bitsandbytes stores them."""

    def __init__(self, linear):
        super().__init__()
        packed = (linear.weight.flatten()[::2] * 50).to(torch.int8).view(torch.uint8)[:, None]
        self.weight = torch.nn.Parameter(packed, requires_grad=False)


class Scaled(torch.Tensor):
    """A quantised weight as torchao has it: a tensor of numbers and a scale that knows few operations."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.numbers, self.scale = (weight * 50).to(torch.int8), torch.tensor(0.02)

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"no {func} of a quantised tensor")


class Buffers(torch.nn.Module):
    """A quantised linear layer without parameters, as GPTQ makes it."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", (linear.weight * 50).to(torch.int32))


def scaled(linear):
    linear.weight = torch.nn.Parameter(Scaled(linear.weight.detach()), requires_grad=False)
    return linear


@pytest.mark.parametrize("quantise", [Packed, scaled, Buffers, lambda linear: linear.to(torch.float8_e4m3fn)])
def test_a_fingerprint_is_of_full_weights_and_an_identity_of_any(quantise):
    stock, model = llava(), llava()
    layer = model.model.language_model.layers[1].self_attn
    layer.q_proj = quantise(layer.q_proj)
    assert models.fingerprint(model) == models.fingerprint(stock)
    assert models.identity(model) != models.identity(stock)
    for name, path in (
        ("projector", "multi_modal_projector"),
        ("tower", "vision_tower.encoder.layers.0.mlp"),
    ):
        model = llava()
        owner = model.model.get_submodule(path)
        child = next(n for n, module in owner.named_children() if isinstance(module, torch.nn.Linear))
        setattr(owner, child, quantise(getattr(owner, child)))
        with pytest.raises(CodebookError, match=f"the (?:vision )?{name} is quantised.*llm_int8_skip_modules"):
            models.fingerprint(model)
        assert models.identity(model) != models.identity(stock)


def test_a_model_without_weights():
    with torch.device("meta"):
        model = llava()
    with pytest.raises(CodebookError, match="the model has no weights yet"):
        models.fingerprint(model)


def test_shape():
    model = llava()
    model.config.text_config.head_dim = None  # some configs have none
    assert models.shape(model) == models.Shape(
        tokens=SIDE * SIDE,
        layers=4,
        attending=frozenset(range(4)),
        reusing=frozenset(),
        stages=4,
        hidden=48,
        intermediate=96,
        heads=4,
        kv_heads=2,
        head_size=12,
    )


def test_images_say_what_they_are():
    model, n = llava(), SIDE * SIDE
    [[image]] = models.family(model).images(model, [[5, *[IMAGE] * n, 6]], {"image": None})
    assert repr(image) == f"<image of {n} visual tokens: view {SIDE} x {SIDE}>"
    crops = models.Layout.stacked(3, 4, 5, "crop")
    mixed = models.Layout(85, (*crops.grids, models.Grid(60, 5, 5)))
    assert repr(models.Image("image", mixed, tuple(range(85)))) == (
        "<image of 85 visual tokens: 3 x crop 4 x 5, view 5 x 5>"
    )


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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CodebookError) as caught:
        models.load(name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_saved_model_loads_from_its_folder(tmp_path):
    model = llava()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert models.same_fingerprint(models.fingerprint(model), models.fingerprint(again))


def test_overlay_shows_kept_tokens_bright_and_framed():
    picture = overlay(Image.new("RGB", (96, 96), "white"), [0, 13], (12, 12))
    width = (picture.width - 16) // 2
    patch = width // 12

    def at(row, col, dx=0.5, dy=0.5):
        return picture.getpixel((int(width + 16 + (col + dx) * patch), int((row + dy) * patch)))

    assert at(0, 0) == at(1, 1) == (255, 255, 255)
    assert max(at(0, 1)) < 90 and max(at(5, 5)) < 90
    assert at(1, 1, 0.0, 0.5) == (255, 196, 0)
