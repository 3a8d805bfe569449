"""`codebook check`: a model with a file of its own, one without, one that is refused, and garbage."""

import json
import shutil

import pytest
import transformers as hf
from PIL import Image, ImageOps

from codebook import CodebookError, models
from codebook.models import SHIPPED_MODELS, coded
from codebook.models.generic import WHAT_WORKS
from codebook.pruning import DivPrune, Schedule, Stage


class NewConfig(hf.LlavaConfig):
    model_type = "brand_new"


class New(hf.LlavaForConditionalGeneration):
    config_class = NewConfig


@pytest.fixture
def new(tmp_path):
    """The miniature under a name that nobody knows; transformers has its class."""
    shipped, folder = SHIPPED_MODELS["miniature"], tmp_path / "new"
    shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    stock = hf.LlavaForConditionalGeneration.from_pretrained(shipped)
    settings = stock.config.to_dict()
    del settings["model_type"], settings["architectures"]
    made = New(NewConfig(**settings))
    made.load_state_dict(stock.state_dict())
    made.save_pretrained(folder)
    hf.AutoConfig.register("brand_new", NewConfig)
    hf.AutoModelForImageTextToText.register(NewConfig, New)
    yield folder
    del hf.models.auto.configuration_auto.CONFIG_MAPPING._extra_content["brand_new"]
    del hf.AutoModelForImageTextToText._model_mapping._extra_content[NewConfig]


def test_a_model_with_a_file_of_its_own(run):
    code, out, err = run("check", "miniature")
    assert code == 0 and not err
    assert out.splitlines() == [
        "llava: a file of its own describes it",
        "image token: 4",
        "picture of 96 x 96 pixels: 144 image tokens, 0 of them structural; grid of 12 x 12: 144 of 144 are "
        "where their patches are",
        "all that docs/models.md says of it works",
    ]


def test_a_model_that_nobody_knows(run, refused, new, tmp_path):
    code, out, err = run("check", new)
    assert code == 0 and "error" not in err
    assert out.splitlines()[0] == "brand_new: no file describes it; the generic family is tried"
    assert out.splitlines()[-1] == WHAT_WORKS
    report = json.loads(run("check", new, "--json")[1])
    assert report["passed"] and not report["known"] and report["works"] == WHAT_WORKS and report["reason"] is None
    assert report["model_type"] == "brand_new" and report["image_token"] == 4
    assert report["pictures"] == [{"size": [96, 96], "grid": [12, 12], "tokens": 144, "structural": 0, "right": 144}]
    Image.effect_noise((96, 96), 90).convert("RGB").save(picture := tmp_path / "picture.png")
    ask = ["--image", picture, "--ask", "describe.", "--keep", "0.25", "--method", "divprune", "--json"]
    ours, stock = (json.loads(run("prune", name, *ask)[1]) for name in (new, "miniature"))
    assert ours["answer"] == stock["answer"] and ours["kept"] == stock["kept"] and len(ours["kept"][0]) == 36
    for method in ("fastv", "cls"):
        refused("prune", new, *ask[:-3], "--method", method, words=["not known for models of type brand_new", "use"])


def test_a_model_that_transformers_loaded_is_tested_at_first_use(new, monkeypatch):
    """With the processor that lies beside its weights."""
    model = New.from_pretrained(new)
    with Schedule([Stage(0, 0.5, DivPrune())])(model) as pruning:
        assert pruning.family.name == "brand_new" and pruning.family.grid(model) == (12, 12)
    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", None)
    assert models.family(model) is pruning.family
    with pytest.raises(CodebookError, match=r"must be tested once: call codebook.check_model"):
        models.family(New(model.config))


def test_a_model_that_is_refused(run, new, monkeypatch):
    drawn = coded.drawn
    monkeypatch.setattr(coded, "drawn", lambda *given: ImageOps.flip(drawn(*given)))
    code, out, err = run("check", new, "--json")
    report = json.loads(out)
    assert code == 2 and not report["passed"] and report["works"] is None
    assert err.splitlines()[-1] == f"error: {report['reason']}" and "do not stand where their patches are" in err
    code, out, err = run("check", new)
    assert code == 2 and out.splitlines()[-1] == "refused"
    code, out, err = run("prune", new, "--image", "nothing.png", "--ask", "describe.", "--method", "divprune")
    assert code == 2 and not out


def test_garbage(refused, tmp_path):
    refused("check", tmp_path, words=["holds no config.json"])
    (tmp_path / "config.json").write_text("{")
    refused("check", tmp_path, words=["cannot load"])
    hf.LlamaConfig().save_pretrained(tmp_path)
    refused("check", tmp_path, words=["type llama are not supported"])
