"""Model cards: what the hub reads of them, and texts from strangers in them."""

import pytest
from huggingface_hub import ModelCard

from codebook.store.card import make_card
from tests.store.books import make


def front(card):
    """What the hub's own client reads of a card."""
    return ModelCard(card).data.to_dict()


def test_front_matter():
    config = make(model="llava-hf/llava-1.5-7b-hf", licence="apache-2.0").config
    assert front(make_card(config)) == {
        "library_name": "codebook", "license": "apache-2.0", "base_model": "llava-hf/llava-1.5-7b-hf",
        "tags": ["visual-token-pruning", "vision-language-model"],
    }  # fmt: skip
    assert front(make_card(config, "mit"))["license"] == "mit"
    assert front(make_card(make().config))["license"] == "unknown"


@pytest.mark.parametrize(
    "model", ["miniature", "/models/llava", "a/b/c", "a/b\nlicense: mit", "a b/c", "-a/b", "a/b: c", ""]
)
def test_what_is_no_name_on_the_hub_is_no_base_model(model):
    assert "base_model" not in front(make_card(make(model=model).config))


def test_a_folder_is_no_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models" / "llava").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front(make_card(make(model="models/llava").config))
    assert front(make_card(make(model="models/llava2").config))["base_model"] == "models/llava2"


def test_texts_from_strangers_stay_in_their_line():
    evil = "x\n---\n# [click](http://evil) <script> | `a`"
    config = make(model=evil, source=evil, about_images=evil, funnel={evil: 1}, settings={"prompt": evil}).config
    card = make_card(config)
    assert len(card.splitlines()) == len(make_card(make(
        model="m", source="s", about_images="i", funnel={"a": 1}, settings={"prompt": "p"}
    ).config).splitlines())  # fmt: skip
    assert "<script>" not in card and "[click]" not in card.replace("\\[click\\]", "")
    assert all(
        len(line) < 700 for line in make_card(make(model="m" * 9999, funnel={"a" * 9999: 1}).config).splitlines()
    )


def test_sections():
    settings = {"tau_p": 0.1, "prompt": "why?"}
    card = make_card(make(images={"used": 7, "skipped": []}, funnel={"probed": 9}, settings=settings).config)
    for line in ("Built from 7 images, which are not", "| probed | 9 |", "| tau_p | 0.1 |", "| prompt | why? |"):
        assert line in card
    assert "## Figures" not in card and "sheet.png" not in card
    card = make_card(make().config, figures="| a |", sheet=True)
    assert "## Figures\n\n| a |\n" in card and "](sheet.png)" in card
