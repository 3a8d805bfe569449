"""A codebook prunes the model that it was built for, and no other of the same dimension."""

import copy
from pathlib import Path

import pytest
import torch

from codebook import Codebook, CodebookError, RedundancyCodebook, Schedule
from codebook.models import fingerprint
from codebook.pruning import SeededFarthestPoint, Stage, Uniform, Union, Weighted, Window
from codebook.store import codebook as store
from tests.prompts import ONE, prompt
from tests.tiny import llava


@pytest.fixture
def models():
    return [llava("sdpa", seed=seed) for seed in (0, 1)]


def book_of(model, **config):
    width = model.config.get_text_config().hidden_size
    return Codebook(torch.eye(width)[:3], None, {"fingerprint": fingerprint(model), **config})


def pruners(book):
    codebook = RedundancyCodebook(book)
    return [
        codebook,
        SeededFarthestPoint(book),
        Weighted((codebook,), (1.0,)),
        Union(Uniform(), codebook),
        Window(codebook),
        Union(Window(Weighted((codebook, codebook), (1.0, 2.0))), codebook),
    ]


@pytest.mark.parametrize("kind", range(6))
def test_another_models_codebook_is_refused(models, kind):
    own, other = models
    schedule = Schedule([Stage(0, 9, Uniform()), Stage(1, 3, pruners(book_of(own))[kind])])
    with torch.no_grad(), schedule(own) as pruning:
        own(**prompt(own, ONE))
    assert [len(kept) for kept in pruning.kept[0]] == [9, 3]
    for scope in ("model", "thread"):
        with pytest.raises(CodebookError, match="another tower or projector"):
            schedule(other, scope)
    with torch.no_grad():  # nothing of the refused context is left behind
        other(**prompt(other, ONE))


def test_a_codebook_of_unknown_origin_is_taken(models):
    for model in models:
        schedule = Schedule([Stage(0, 3, RedundancyCodebook(book_of(models[0], fingerprint=None)))])
        with torch.no_grad(), schedule(model) as pruning:
            model(**prompt(model, ONE))
        assert len(pruning.kept[0][0]) == 3


def test_each_pair_is_looked_at_once(models, monkeypatch):
    looks = []
    monkeypatch.setattr(store, "fingerprint", lambda model: (looks.append(model), fingerprint(model))[1])
    first, second = (book_of(models[0]) for _ in range(2))
    for book in (first, second):
        for keep in (3, 4):
            schedule = Schedule([Stage(0, keep, RedundancyCodebook(book))])
            for _ in range(3):
                schedule(models[0])
    assert looks == [models[0], models[0]]
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(CodebookError):
            schedule(models[1])


def test_a_model_whose_weights_have_changed_is_looked_at_again(models):
    model, other = copy.deepcopy(models[0]), models[1]
    schedule = Schedule([Stage(0, 3, RedundancyCodebook(book_of(model)))])
    schedule(model)
    model.load_state_dict(other.state_dict())
    with pytest.raises(CodebookError, match="another tower or projector"):
        schedule(model)
    model.load_state_dict(models[0].state_dict())
    schedule(model)


def test_the_name_of_a_codebook_is_none(models):
    """Of a folder or a name only `for_model` and `load` make one: a pruner has nobody to ask whose it is."""
    for name in ("indexes/miniature", Path("indexes/miniature")):
        for pruner in pruners(name):
            with pytest.raises(
                CodebookError, match=r"the codebook of \w+ is 'indexes/miniature', the name of one: give"
            ):
                Schedule([Stage(0, 3, pruner)])(models[0])
        with pytest.raises(CodebookError, match="is 'indexes/miniature', the name of one"):
            Schedule.parse("seeded:0.25", name)(models[0])
