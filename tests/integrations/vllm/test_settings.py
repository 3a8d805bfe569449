"""The settings of the vLLM plug-in, without vLLM: what is refused, and what is kept."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from codebook import METHODS, Codebook
from codebook.errors import CodebookError
from codebook.integrations.vllm.settings import VllmSettings, surviving
from codebook.models.layout import Grid, Layout
from codebook.pruning.methods.base import beyond_features
from codebook.pruning.tokens import VisualTokens

BOOK = str(Path(__file__).parents[3] / "indexes/miniature")
WIDTH = 160
NEWLINES = Layout(64 + 8 * 9, (Grid(0, 8, 8), Grid(64, 8, 8, "crop", 9)))


def config(width=WIDTH, **given):
    return SimpleNamespace(codebook_config=given, get_text_config=lambda: SimpleNamespace(hidden_size=width))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "lacks 'method'"),
        ({"method": "uniform"}, "lacks 'keep'"),
        ({"method": "uniform", "keep": 0.2, "budget": 3}, "unknown key 'budget'"),
        ({"method": "uniform", "keep": 0.2, "codebok": BOOK}, "did you mean codebook?"),
        ({"method": "uniform", "keep": "0.2"}, "keep must be a fraction"),
        ({"method": "uniform", "keep": True}, "keep must be a fraction"),
        ({"method": "uniform", "keep": 0.0}, "keep must be a fraction"),
        ({"method": "uniform", "keep": 1.5}, "keep must be a fraction"),
        ({"method": "uniform", "keep": 0}, "keep must be a fraction"),
        ({"method": 5, "keep": 0.2}, "is a string, not 5"),
        ({"method": "magic", "keep": 0.2}, "no method 'magic'"),
        ({"method": "unpruned", "keep": 0.2}, "name one method"),
        ({"method": "uniform,random@3", "keep": 0.2}, "name one method"),
        ({"method": "uniform;positions=keep", "keep": 0.2}, "name one method"),
        ({"method": "uniform:0.2", "keep": 0.2}, "leave it out"),
        ({"method": "uniform@3", "keep": 0.2}, "at layer 3"),
        ({"method": "seeded", "keep": 0.2, "codebook": BOOK}, "use codebook-farthest"),
        ({"method": "farthest+mass", "keep": 0.2}, "use farthest, the same without"),
        ({"method": "farthest+distance", "keep": 0.2}, "use farthest, the same without"),
        ({"method": "divprune-merged", "keep": 0.2}, "divprune-merged needs to merge tokens"),
        ({"method": "fastv", "keep": 0.2}, "fastv needs attention, and vLLM prunes where images are encoded"),
        ({"method": "cls", "keep": 0.2}, "cls needs the vision tower's attention"),
        ({"method": "cdpruner", "keep": 0.2}, "cdpruner needs the text"),
        ({"method": "pool", "keep": 0.2}, "pool needs to merge tokens"),
        (
            {"method": "codebook-threshold", "keep": 0.2, "codebook": BOOK},
            "needs to say how many tokens stay, and vLLM",
        ),
        ({"method": "drop", "keep": 0.2}, "drop needs a later layer, and vLLM"),
        ({"method": "codebook", "keep": 0.2}, "lacks 'codebook'"),
        ({"method": "codebook", "keep": 0.2, "codebook": 3}, "codebook is 3"),
        ({"method": "codebook", "keep": 0.2, "codebook": "/nowhere"}, "no codebook in /nowhere"),
        ({"method": "uniform", "keep": 0.2, "codebook": BOOK}, "needs no codebook"),
    ],
)
def test_wrong_settings_are_refused(given, words):
    with pytest.raises(CodebookError) as refused:
        VllmSettings.read(config(**given))
    assert words in str(refused.value)


def test_missing_settings_and_another_models_codebook_are_refused():
    with pytest.raises(CodebookError, match="codebook vllm-args"):
        VllmSettings.read(SimpleNamespace())
    with pytest.raises(CodebookError, match="it must be a dictionary"):
        VllmSettings.read(SimpleNamespace(codebook_config="seeded"))
    with pytest.raises(CodebookError, match="dimension 160, and the visual tokens of this model have 64"):
        VllmSettings.read(config(width=64, method="codebook", keep=0.2, codebook=BOOK))


def usable():
    """The methods that pass by their class, with their settings."""
    found = []
    for name, method in METHODS.items():
        given = {"method": name, "keep": 0.25} | ({"codebook": BOOK} if method.needs_codebook else {})
        try:
            found.append(VllmSettings.read(config(**given)))
        except CodebookError:
            continue
    return found


def test_the_page_names_the_methods_that_pass_and_the_others_are_told_of_one():
    said = (Path(__file__).parents[3] / "docs/vllm.md").read_text()
    listed = re.search(r"Its class says so: (.*?), and those that you add", said, re.DOTALL)[1]
    passing = set()
    for name, method in METHODS.items():
        try:
            VllmSettings.of({"method": name, "keep": 0.25} | ({"codebook": BOOK} if method.needs_codebook else {}))
            passing.add(name)
        except CodebookError as error:
            assert "use codebook-farthest" in str(error), name
    assert passing == set(re.findall(r"`([a-z-]+)`", listed))


def test_what_passes_needs_nothing_but_features():
    """Every method that passes chooses with the rest out of reach; those that do not say what they need."""

    class Alone(VisualTokens):
        sequence = span = question = attention = vision = encode = property(lambda tokens: pytest.fail("reached"))

        def __init__(self, features, grid):
            ordinal = torch.arange(len(features))
            vars(self).update(features=features, hidden=features, ordinal=ordinal, grid=grid, key=torch.tensor(3))

    found = {type(settings.stage.pruner).__name__: settings for settings in usable()}
    assert {"RedundancyCodebook", "SeededFarthestPoint", "FarthestPoint", "DivPrune", "Uniform", "Random"} <= set(found)
    features = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    for settings in found.values():
        assert len(settings.stage.pruner.select(Alone(features, (8, 8)), 16)) == 16


@pytest.mark.parametrize("settings", usable(), ids=str)
def test_each_grid_keeps_its_share_and_structural_tokens_stay(settings):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NEWLINES.length, WIDTH, generator=generator)
    [kept] = settings.choose([features], [NEWLINES], [features])
    assert settings.kept(NEWLINES) == len(kept) == 16 + 16 + 8
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert set(range(64 + 8, NEWLINES.length, 9)) <= set(kept.tolist())
    assert sum(place < 64 for place in kept.tolist()) == 16
    view = Layout.stacked(1, 8, 8, "view")
    both = settings.choose([features, features[:64]], [NEWLINES, view], [features, features[:3]])
    assert both[0].tolist() == kept.tolist()
    [alone] = settings.choose([features[:64]], [view], [features[:3]])
    assert both[1].tolist() == alone.tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("settings", usable(), ids=str)
def test_damage_shows_whichever_tokens_stay(settings, value):
    features = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)).half()
    view = Layout.stacked(1, 8, 8, "view")
    for place in range(0, 64, 9):
        damaged = features.index_fill(0, torch.tensor([place]), value)
        [index] = settings.choose([damaged], [view], [features])
        stays = surviving(damaged, index)
        assert stays.shape == (16, WIDTH) and stays.isnan().all()
    [index] = settings.choose([features], [view], [features])
    assert torch.equal(surviving(features, index), features[index])


def test_the_digest_differs_with_whatever_changes_the_choice(tmp_path):
    given = {"method": "codebook", "keep": 0.25, "codebook": BOOK}
    first = VllmSettings.of(given).digest
    assert first == VllmSettings.of(dict(given)).digest
    book = Codebook.load(BOOK)
    Codebook(book.prototypes[1:].clone(), book.provenance[1:]).save(tmp_path / "other")
    others = [
        {**given, "keep": 0.5}, {**given, "keep": 25}, {**given, "method": "codebook-farthest"},
        {**given, "method": "codebook(scoring='double_softmax')"}, {**given, "codebook": str(tmp_path / "other")},
    ]  # fmt: skip
    assert len({first, *(VllmSettings.of(other).digest for other in others)}) == 6


def test_methods_of_parts_need_what_the_parts_need():
    from codebook import CDPruner, Random, Uniform
    from codebook.pruning.methods.combine import Union

    assert not beyond_features(Union(Uniform(), Random()))
    assert beyond_features(Union(CDPruner(), Random())) == "the text"
