"""From words to a schedule for a loaded model, as the command line goes and as users go by themselves."""

from pathlib import Path

import pytest
import torch

from codebook import Codebook, CodebookError, Schedule, load, prebuilt
from codebook.pruning import Drop, FastV, Random, SeededFarthestPoint, Stage
from codebook.pruning.plan import Plan
from codebook.store import known
from tests.tiny import llava


@pytest.fixture(scope="module")
def model():
    return load("miniature", "cpu")[0]


@pytest.fixture
def loads(monkeypatch):
    """The folders that codebooks are read from."""
    seen, read = [], Codebook.load
    monkeypatch.setattr(Codebook, "load", lambda path: (seen.append(Path(path)), read(path))[1])
    return seen


def test_the_default_is_the_command_lines(model):
    schedule = Schedule.for_model(model)
    [stage] = schedule.stages
    assert (stage.layer, stage.keep, stage.mass) == (0, 0.2, True) and stage.count(144) == 28  # 0.2 is 28.8
    assert isinstance(stage.pruner, SeededFarthestPoint)
    assert str(schedule) == "codebook-middle:0.2+mass" == str(Plan("seeded-middle").apply(model))
    assert len(stage.pruner.codebook) == len(prebuilt(model))


@pytest.mark.parametrize(
    "text,keep,solved",
    [
        ("uniform", 0.25, "uniform:0.25"),
        ("uniform", 36, "uniform:36"),  # a count is a count
        ("uniform:0.3", None, "uniform:0.3"),  # what the text says itself
        ("uniform:1.0, random@6:10", 0.25, "uniform:0.431, random(seed=5)@6:10"),  # 6 * 62 + 6 * 10 = 432 = 12 * 36
        (
            "pyramiddrop",
            None,
            ", ".join(f"fastv(own_layer=True)@{at}" for at in ("3:0.5", "6:0.25", "9:0.125")) + "; positions=compact",
        ),
        ("random; positions=compact", 0.5, "random(seed=5):0.5; positions=compact"),
    ],
)
def test_budgets(model, text, keep, solved):
    assert str(Schedule.for_model(model, text, keep, seed=5)) == solved == str(Plan(text, keep, seed=5).apply(model))


def test_a_budget_keeps_of_images_of_every_size_what_a_stage_keeps(model):
    [stage] = Schedule.for_model(model, "uniform", 0.1875).stages  # 27 of 144 tokens, as 0.188 and 0.19 are
    assert [stage.count(n) for n in (16, 144, 576, 1600)] == [3, 27, 108, 300]
    first, second = Schedule.for_model(model, "uniform:1.0, random@6:0.1", 0.25).stages
    assert (first.keep, second.keep) == (0.452, 0.049)  # 65 and 7 of 144: 6 * 65 + 6 * 7 = 432 = 12 * 36


def test_the_codebook_is_read_once_and_only_where_it_is_needed(model, loads):
    schedule = Schedule.for_model(model, "seeded+codebook@6:0.05", 0.25)
    first, second = (stage.pruner.codebook for stage in schedule.stages)
    assert first is second and len(loads) == 1
    Schedule.for_model(model, "fastv+random@8", 0.25)
    Plan("seeded+codebook@6:0.05", 0.25)
    assert len(loads) == 1


def test_a_codebook_that_is_given(model, loads):
    book = prebuilt(model)
    [folder] = loads
    for given in (folder, str(folder), book):
        [stage] = Schedule.for_model(model, codebook=given).stages
        assert stage.pruner.codebook.prototypes.equal(book.prototypes)
    assert stage.pruner.codebook is book
    for wrong in (folder, book):
        with pytest.raises(CodebookError, match="another tower or projector"):
            Schedule.for_model(llava("sdpa"), codebook=wrong)


@pytest.mark.parametrize("given", [3, {}, torch.zeros(2, 2)])
def test_what_is_no_codebook(model, given):
    with pytest.raises(
        CodebookError, match=r"a codebook is a Codebook, its folder or its name, not .*: `codebook list`"
    ):
        Schedule.for_model(model, "seeded", 0.2, given)


def test_a_model_without_a_codebook():
    remedies = r"`codebook pull .*`codebook build .*`--method 'divprune\(middle=True\)\+mass'`"
    with pytest.raises(CodebookError, match=remedies):
        Schedule.for_model(llava("sdpa"))
    assert str(Schedule.for_model(llava("sdpa"), "farthest+mass", 0.25)) == "farthest:0.25+mass"


def test_files_of_schedules_with_a_codebook(model, tmp_path, loads):
    path = tmp_path / "schedule.json"
    schedule = Schedule.for_model(model, "seeded+random@8; spread=codebook", 0.25, seed=3)
    schedule.save(path)
    book = schedule.stages[0].pruner.codebook
    for again in (
        Schedule.load(path, model=model),
        Schedule.load(path, book, model=model),
        Schedule.load(path, loads[0]),
        Schedule.load(path, book),
        Plan(str(path)).apply(model),
    ):
        assert str(again) == str(schedule) and again.spread == book.spread
        assert again.stages[0].pruner.codebook.prototypes.equal(book.prototypes)
    with pytest.raises(CodebookError, match=r"needs a codebook.*for_model"):
        Schedule.load(path)
    with pytest.raises(CodebookError, match="another tower or projector"):
        Schedule.load(path, book, model=llava("sdpa"))


def test_plans_are_checked_before_there_is_a_model(monkeypatch):
    monkeypatch.setattr(known, "folders", lambda: pytest.fail("looked for a codebook"))
    assert Plan("seeded").keep == 0.2 and Plan("seeded:9").keep is None
    for text, says in (
        ("seded", "did you mean seeded"),
        ("seeded(representatives=-1)", "give 0 or more"),
        ("codebook+codebook@0", "ascending"),
        ("codebook@1:0.1, seeded@2:0.5", "come back"),
        ("uniform; spread=codebook", "no stage has a codebook"),
    ):
        with pytest.raises(CodebookError, match=says):
            Plan(text)
    with pytest.raises(CodebookError, match="not 'odd'"):
        Plan("seeded", positions="odd")
    with pytest.raises(CodebookError, match="not 2"):
        Plan("seeded", 2.0)


def test_stages_compare_by_what_they_do(model):
    vtw = Schedule.for_model(model, "fastv+drop@9", 0.5)
    assert vtw.stages[1] == Stage(9, 0, Drop()) and vtw.stages[0].pruner == FastV()
    assert Schedule.for_model(model, "random", 0.5, seed=4).stages == (Stage(0, 0.5, Random(4)),)
