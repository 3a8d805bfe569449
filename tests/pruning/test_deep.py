"""Where a schedule's last stage begins if its text leaves that to the information horizon."""

import json
import logging

import pytest

from codebook import CodebookError, Schedule, load, models, prebuilt
from codebook.evaluation.rows import plan
from codebook.pruning import deep
from codebook.store import horizons, known
from tests.tiny import llava

CURVE = {"loss": [0.5] * 11 + [0.0], "error": [0.1] * 12, "layer": 9, "interval": [9, 9], "safe": 10}


@pytest.fixture(scope="module")
def model():
    return load("miniature", "cpu")[0]


@pytest.fixture
def book(model, tmp_path, monkeypatch):
    """A codebook of the miniature's in a folder of its own, the only one on this machine."""
    folder = tmp_path / "book"
    prebuilt(model).save(folder)
    monkeypatch.setattr(known, "folders", lambda: [folder])
    monkeypatch.setattr(known, "read_registry", lambda: ())
    monkeypatch.setattr(known, "_pulled", lambda: ())
    deep._warn.cache_clear()
    return folder


def put(folder, model, **changes):
    curve = CURVE | changes
    content = {"eps": 0.01, "start": 0, "fingerprint": models.whole_fingerprint(model)}
    (folder / "horizon.json").write_text(json.dumps(content | {"horizons": {"exist": CURVE, "mean": curve}}))


def guesses(caplog):
    return [record for record in caplog.records if record.name == deep.__name__]


def layer(schedule):
    return schedule.stages[-1].layer


@pytest.mark.parametrize("text", ["codebook+random", "divprune+random", "seeded+drop; positions=compact"])
def test_it_is_the_measured_layer_and_nothing_is_said(model, book, caplog, text):
    put(book, model)
    assert layer(Schedule.for_model(model, text, 0.25)) == 10
    assert layer(Schedule.for_model(model, text, 0.25, book)) == 10
    row = plan(model, [text], [0.25])[0][1]
    assert layer(row.schedules[0]) == 10 and not guesses(caplog)


def test_withdrawal_without_a_budget_begins_there_too(model, book, caplog):
    put(book, model)
    assert Schedule.for_model(model, "vtw").counts(144, 12) == [144] * 10 + [0] * 2
    assert Schedule.for_model(model, "vtw", 0.25).counts(144, 12) == [144] * 3 + [0] * 9  # a budget moves it
    assert not guesses(caplog)


def test_a_layer_that_is_named_stays(model, book, caplog):
    put(book, model)
    assert layer(Schedule.for_model(model, "codebook+random@6", 0.25)) == 6
    put(book, model, safe=12)
    assert layer(Schedule.for_model(model, "codebook+random@6", 0.25)) == 6 and not guesses(caplog)


@pytest.mark.parametrize("text, guess", [("codebook+random", 8), ("divprune+drop", 8), ("vtw", 6)])
@pytest.mark.parametrize(
    "safe, why",
    [("no file", "nothing was measured on this model"), (None, "could not show a horizon: the unpruned model answers")],
)
def test_a_guess_is_called_one_once(model, book, caplog, text, guess, safe, why):
    """20, 21 and 16 of 32 layers are 7.5, 7.9 and 6 of 12."""
    if safe is None:
        put(book, model, safe=None, layer=None, interval=None, unknown="the unpruned model answers 0 of 5 right")
    keep = None if text == "vtw" else 0.25
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert layer(Schedule.for_model(model, text, keep)) == guess
    [record] = guesses(caplog)
    said = record.getMessage()
    assert said.startswith(f"{text}: ") and f"layer {guess} of 12" in said and "a guess" in said and why in said
    assert "\n" not in said


def test_a_model_that_reads_to_its_last_layer_has_no_deep_stage(model, book):
    put(book, model, safe=12)
    for text, keep in (("codebook+random", 0.25), ("vtw", None)):
        with pytest.raises(CodebookError, match=r"to the last layer, so .* leave that stage out, or name its layer"):
            Schedule.for_model(model, text, keep)
    _, skipped = plan(model, ["codebook+random"], [0.25])
    assert [(one["method"], "to the last layer" in one["reason"]) for one in skipped] == [("codebook+random", True)]
    Schedule.for_model(model, "vtw", 0.25)


def test_a_horizon_of_another_model_is_passed_over_and_named_where_its_codebook_is(model, book, caplog):
    """A codebook serves every model with its tower, and may come with the horizon of one of them."""
    other = llava("sdpa")
    put(book, other, safe=2)
    for source in (book, str(book), prebuilt(model)):
        assert layer(Schedule.for_model(model, "divprune+random", 0.25, source)) == 8
    [record] = guesses(caplog)
    assert f"{book / 'horizon.json'} is of another model" in record.getMessage()
    assert layer(Schedule.for_model(model, "divprune+random", 0.25)) == 8
    assert len(guesses(caplog)) == 2 and "nothing was measured on this model" in guesses(caplog)[1].getMessage()
    assert layer(Schedule.for_model(other, "divprune+random", 0.6)) == 2  # 3 of 4, scaled
    assert len(guesses(caplog)) == 2


def test_what_a_file_says_of_itself_is_shortened(model, book, caplog):
    put(book, model, safe=None, layer=None, interval=None, unknown="\n" + "x" * 9999)
    Schedule.for_model(model, "divprune+random", 0.25)
    [record] = guesses(caplog)
    assert "\n" not in record.getMessage() and len(record.getMessage()) < 700


def test_another_language_model_behind_the_same_tower_is_another_model(book):
    first, second = load("miniature", "cpu")[0], load("miniature", "cpu")[0]
    for decoder_layer in second.get_decoder().layers:
        weight = decoder_layer.mlp.up_proj.weight
        weight.data[weight.shape[0] // 2, 0] += 1  # the number in the middle
    assert models.fingerprint(first) == models.fingerprint(second)
    put(book, first)
    assert horizons.find_horizon(first).safe == 10 and horizons.find_horizon(second) is None
