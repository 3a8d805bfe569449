"""Calibration finds what is behind a known horizon, refuses what is noise, and resumes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from codebook.analysis import calibrate, likelihood
from codebook.analysis.calibration import Search, check_sample_count, left_after, most_answers, search_count
from codebook.analysis.deep_stages import candidate_schedules
from codebook.errors import CodebookError
from codebook.inference.prompts import prepare_samples
from codebook.inference.samples import Sample, mixed
from codebook.miniature.samples import of_miniature
from codebook.miniature.tasks import TASK_FAMILIES
from codebook.pruning import DivPrune, Drop, FastV, Random, Schedule, Stage
from codebook.store.journal import Journal
from tests.analysis.conftest import LAYERS, READS

N = 144


@pytest.fixture(scope="module")
def samples(model, processor):
    """Twelve of each family with one image; the right answer is the first word that the unpruned model says.

    Each family has scenes of its own, so that all samples are independent draws.
    """
    found = []
    for sample in (one for i, family in enumerate(TASK_FAMILIES) for one in of_miniature("train", i, 12, [family])):
        if len(sample.images) > 1:
            continue
        with torch.no_grad():
            top = model(**prepare_samples(model, processor, [sample]).inputs).logits[0, -1].argmax()
        found.append(Sample(sample.images, sample.question, processor.tokenizer.decode(top), sample.task))
    return [sample for sample in found if sample.answer.strip()]


def test_candidates_share_one_budget(model):
    plain, found = candidate_schedules(model, "random", 36, at=[3, 5])
    assert str(plain) == "random:36" and plain.budget(N, LAYERS) == 0.25
    # 36 * 6 = 216 = 3 * (48 + 24) = 3 * 72, and 3 * (57 + 14) = 213: 58 and a quarter of it would be 73, rounded.
    assert {"random:48, random@3:24", "random:57, random@3:14", "random:72, drop@3"} <= {str(s) for s in found}
    assert all(0.24 < s.budget(N, LAYERS) <= 0.25 for s in found)
    assert len({str(s) for s in found}) == len(found) == 10
    assert not any("drop" in str(s) for s in candidate_schedules(model, "random", 0.25, drop=False)[1])


def test_a_share_holds_for_images_of_every_size(model):
    counted, shared = (
        [one, *more] for one, more in (candidate_schedules(model, "random", k, at=[3]) for k in (36, 0.25))
    )
    assert str(shared[0]) == "random:0.25" and len(counted) == len(shared) == 6
    for own, other in zip(counted, shared, strict=True):
        assert [stage.count(N) for stage in own.stages] == [stage.count(N) for stage in other.stages]
        # Of a quarter and of twice the pixels: the count 48 does not fit in the one, and is a sixth of the other.
        assert all(0.22 < other.budget(size, LAYERS) < 0.28 for size in (N // 4, 2 * N))


def test_candidates_behind_a_first_stage_in_the_decoder(model):
    plain, found = candidate_schedules(model, "fastv@2", 0.5)
    assert [stage.layer for stage in plain.stages] == [2]
    assert {tuple(stage.layer for stage in s.stages) for s in found} == {(2, 3), (2, 4), (2, 5)}
    assert candidate_schedules(model, "random", 1.0)[1] == []  # all tokens stay: nothing to give up
    with pytest.raises(CodebookError, match="layers 3 to 5"):
        candidate_schedules(model, "fastv@2", 0.5, at=[2])
    for method in ("vtw", "random+drop", "random:1.0, random@3:0.5"):
        with pytest.raises(CodebookError, match="one method alone"):
            candidate_schedules(model, method, 0.5)


def test_other_methods_are_tried_in_the_deep_stage(model):
    _, bare = candidate_schedules(model, "random", 36, at=[3, 5])
    _, found = candidate_schedules(model, "random", 36, deep=["fastv(query='question')@4", "divprune"], at=[3, 5])
    more = [str(schedule) for schedule in found if schedule not in bare]
    guided = [text for text in more if "fastv(query='question')@4" in text]
    assert len(guided) == 4 and "random:48, fastv(query='question')@4:12" in guided  # 36 * 6 = 4 * 48 + 2 * 12
    assert {text.split("@")[1].split(":")[0] for text in more if "divprune" in text} == {"3", "5"}
    assert len(found) == len(bare) + 4 + 8 and all(0.24 < s.budget(N, LAYERS) <= 0.25 for s in found)
    with pytest.raises(CodebookError, match="can be at layers 1 to 5"):
        candidate_schedules(model, "random", 0.25, deep=["fastv@6"])
    for text in ("fastv@4:0.5", "fastv@4, drop@5", "fastv@4; positions=compact"):
        with pytest.raises(CodebookError, match="a deep stage is one method"):
            candidate_schedules(model, "random", 0.25, deep=[text])
    _, found = candidate_schedules(model, "random", 36, deep=["divprune@5 +mass"], at=[5], drop=False)
    assert [str(s.stages[1]) for s in found if s.stages[1].mass] == [f"divprune@5:{n}+mass" for n in (28, 20, 10, 5)]
    # share * first, where 36 * 6 = (5 + share) * first: 28.2, 19.6, 10.3, 5.3
    with pytest.raises(
        CodebookError, match=r"the deep stage 'vidcom2' can be tried nowhere: .*leave quotas=shared out"
    ):
        candidate_schedules(model, "random; quotas=shared", 0.25, deep=["vidcom2"])


def test_deep_stages_have_the_mass_that_is_written(model):
    _, found = candidate_schedules(model, "random", 0.25, deep=["restore", "uniform + distance"], at=[5], drop=False)
    assert len([s for s in found if s.stages[1].mass == "distance"]) == 8


@pytest.mark.parametrize(("text", "words"), [
    ("drop", "tried as it is: leave 'drop' out"),
    ("random@0", "before the LLM: name a layer"),
    ("downsample", "downsample encodes the image anew, and works before the LLM only"),
    ("downsample@5", "leave it out of later layers"),
    ("codebook-threshold", "decides itself how many"),
    ("vtw", "vtw is a preset and stands alone"),
])  # fmt: skip
def test_what_no_deep_stage_can_be(model, text, words):
    with pytest.raises(CodebookError, match=words):
        candidate_schedules(model, "random", 0.25, deep=[text])


def test_candidates_have_the_settings_of_their_method(model):
    plain, found = candidate_schedules(model, "random; spread=0.2; positions=compact", 0.25, at=[3])
    bare, alike = candidate_schedules(model, "random", 0.25, at=[3])
    assert [s.stages for s in found] == [s.stages for s in alike] and plain.stages == bare.stages
    assert all(s.spread == 0.2 and s.positions == "compact" for s in (plain, *found))


@pytest.mark.parametrize("schedule", [
    Schedule([]), Schedule([Stage(0, 20, Random()), Stage(4, 0, Drop())]), Schedule([Stage(2, 30, FastV())]),
], ids=str)  # fmt: skip
def test_probabilities_are_those_of_generation(model, processor, samples, schedule):
    """Answers of different lengths in one batch, against the steps of generate."""
    group = [samples[i] for i in likelihood.equal_lengths(processor, samples, range(len(samples)), 3)[0]]
    assert len(group) == 3
    inputs = prepare_samples(model, processor, group).inputs
    with schedule(model), torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True,
            eos_token_id=None,
        )  # fmt: skip
    ids = out.sequences[:, inputs["input_ids"].shape[1] :]
    p = torch.stack(out.logits, 1).softmax(-1).gather(-1, ids[..., None])[..., 0]
    [batch] = likelihood.answer_batches(model, processor, group)
    known = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    ours = likelihood.probabilities(model, replace(batch, answers=ids.where(known, 0), known=known), schedule)
    assert torch.allclose(ours, p * known, atol=1e-5)
    means = likelihood.mean_probabilities(model, replace(batch, answers=ids.where(known, 0), known=known), schedule)
    assert means == pytest.approx([float(p[0].mean()), float(p[1, :2].mean()), float(p[2, 0])], abs=1e-5)


def test_tokens_behind_the_horizon_are_spent_before_it(model, processor, samples, tmp_path):
    """Behind the layers that read, tokens are worth nothing: the budget of the blind half doubles the first."""
    plain, found = candidate_schedules(model, "random", 18, at=range(READS, LAYERS))
    assert str(plain) == "random:18"
    seen = []
    result = calibrate(model, processor, samples, plain, found, seed=1, done=seen.append)
    assert result.confirmed and result.gain > 1.645 * result.error > 0
    assert str(result.schedule) == f"random:36, drop@{READS}"
    assert seen == sorted(seen) and seen[-1] == most_answers(len(found), mixed(samples, 1))
    # The random model's first words are the right answers, and it goes on talking.
    assert result.scores == (0, 0) and "no generated answer is right" in str(result) and result.evidence()["unknown"]
    assert [len(means) for means in result.rounds] == [
        1 + len(found),
        1 + left_after(len(found), 1),
        1 + left_after(len(found), 2),
    ]
    result.schedule.save(tmp_path / "schedule.json")
    assert str(Schedule.load(tmp_path / "schedule.json")) == str(result.schedule)


def test_of_known_values_the_best_is_found(model, processor, samples, monkeypatch):
    """What a sample is worth is known: its tokens in the layers that read. Dropping them behind those doubles it."""
    worth = lambda m, batch, s: [sum(s.counts(N, LAYERS)[:READS]) / 1000] * len(batch.answers)  # noqa: E731
    monkeypatch.setattr(likelihood, "mean_probabilities", worth)
    monkeypatch.setattr(Search, "generate", lambda self, schedule, rows: 1.0)
    plain, found = candidate_schedules(model, "random", 36, at=range(READS, LAYERS))
    result = calibrate(model, processor, samples, plain, found)
    assert str(result.schedule) == f"random:72, drop@{READS}" and result.gain == pytest.approx((72 - 36) * READS / 1000)


def test_another_first_stage_can_win(model, processor, samples, monkeypatch):
    likes = lambda m, batch, s: [float(isinstance(s.stages[0].pruner, DivPrune))] * len(batch.answers)  # noqa: E731
    monkeypatch.setattr(likelihood, "mean_probabilities", likes)
    monkeypatch.setattr(Search, "generate", lambda self, schedule, rows: 1.0)
    plain, found = candidate_schedules(model, "random", 0.25, at=[READS])
    other, deeper = candidate_schedules(model, "divprune", 0.25, at=[READS])
    result = calibrate(model, processor, samples, plain, [*found, other, *deeper])
    assert result.schedule in (other, *deeper) and result.gain == 1


def test_noise_is_not_mistaken_for_a_gain(model, processor, samples):
    """Candidates that differ from the plain method by their seed only."""
    plain, others = Schedule([Stage(0, 36, Random())]), [Schedule([Stage(0, 36, Random(i))]) for i in range(1, 5)]
    result = calibrate(model, processor, samples, plain, others)
    assert result.schedule is plain and not result.confirmed and "keep the plain method" in str(result)
    worse = calibrate(model, processor, samples, plain, [Schedule([Stage(0, 1, Random())])])
    assert worse.best is worse.schedule is plain and worse.gain == worse.error == 0
    assert calibrate(model, processor, samples, plain, []).schedule is plain


def test_what_scores_worse_when_generated_is_refused(model, processor, samples, monkeypatch):
    plain, found = candidate_schedules(model, "random", 0.25, at=[READS])
    monkeypatch.setattr(Search, "generate", lambda self, schedule, rows: float(schedule is plain))
    result = calibrate(model, processor, samples, plain, found)
    assert result.gain > 1.645 * result.error and result.schedule is plain and result.scores == (1, 0)
    assert result.unknown is None


def test_unlabelled_samples_are_answered_by_the_unpruned_model(model, processor, samples, monkeypatch):
    unlabelled = [Sample(s.images, s.question, None, s.task) for s in samples[:14]]
    run = Search(model, processor, unlabelled, Journal(None, {}), lambda count: None)
    said = iter(range(14))
    monkeypatch.setattr(
        "codebook.analysis.calibration.answer_prompts",
        lambda *args: [_Said("" if i == 2 else f"red {i}") for i in said],
    )
    assert run.fill_answers() == 1
    assert [s.answer for s in run.samples] == [f"red {i}" for i in range(14) if i != 2]


class _Said:
    def __init__(self, text):
        self.text = text


def test_a_search_goes_on_where_it_was(model, processor, samples, tmp_path, monkeypatch):
    plain, found = candidate_schedules(model, "random", 0.25, at=[2])
    samples = samples[:18]
    whole = calibrate(model, processor, samples, plain, found)
    file, calls = tmp_path / "search.sqlite", []

    def stop(count):
        if count > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, processor, samples, plain, found, file=file, done=stop)
    values = likelihood.mean_probabilities
    monkeypatch.setattr(
        likelihood, "mean_probabilities", lambda m, batch, s: calls.append(len(batch.answers)) or values(m, batch, s)
    )
    again = calibrate(model, processor, samples, plain, found, file=file)
    assert (str(again.schedule), again.gain, again.rounds) == (str(whole.schedule), whole.gain, whole.rounds)
    first = sum(calls)
    calibrate(model, processor, samples, plain, found, file=file)
    assert 0 < first == sum(calls)  # nothing was left to score
    with pytest.raises(CodebookError, match="another plain"):
        calibrate(model, processor, samples, Schedule([Stage(0, 9, DivPrune())]), found, file=file)


def test_too_few_samples(model, processor, samples):
    with pytest.raises(CodebookError, match="17 samples cannot calibrate: give 18"):
        calibrate(model, processor, samples[:17], Schedule([Stage(0, 9, Random())]), [])
    with pytest.raises(CodebookError, match="too few samples to confirm a gain with: give 6 of each task"):
        calibrate(model, processor, [*samples[:15], *samples[-3:]], Schedule([Stage(0, 9, Random())]), [])


def test_what_cannot_run_is_refused_before_anything_is_scored(model, processor, samples, monkeypatch):
    """EVS keeps a whole frame: a picture alone refuses it, beside films too; three frames refuse a deep stage of it."""
    monkeypatch.setattr(Search, "score", lambda *_: pytest.fail("scored"))
    monkeypatch.setattr(Search, "fill_answers", lambda *_: pytest.fail("answered"))
    films = [Sample(s.images * 3, s.question, None, s.task) for s in samples]
    plain, found = candidate_schedules(model, "random", 0.4, at=[READS])
    alone, deeper = candidate_schedules(model, "evs", 0.4, at=[READS])
    for data in (samples, [samples[0], *films[1:]]):
        with pytest.raises(CodebookError, match=r"^evs:0.4 cannot be tried on this data: evs keeps the first frame"):
            calibrate(model, processor, data, plain, [*found, alone])
    with pytest.raises(pytest.fail.Exception, match="answered"):  # 57 of 144 is more than a third
        calibrate(model, processor, films, plain, [*found, alone, *deeper])
    _, deep = candidate_schedules(model, "random", 0.4, at=[READS], deep=["evs"])
    with pytest.raises(CodebookError, match=rf"random:[\d.]+, evs@{READS}:[\d.]+ cannot be tried"):
        calibrate(model, processor, films, plain, deep)


def test_halving():
    assert [left_after(32, i) for i in range(4)] == [32, 11, 4, 1]
    assert [left_after(1, i) for i in range(4)] == [1, 1, 1, 1] and left_after(0, 1) == 0
    # 24 samples, 8 to search with: 27, 9 and 3 candidates beside the plain one, with 2, 2 and 4 of them; then
    # the other 16 under two schedules, by probability and by generation.
    assert most_answers(27, [Sample((), "q", "a")] * 24) == 28 * 2 + 10 * 2 + 4 * 4 + 4 * 16


def test_what_confirms_is_about_other_images():
    """Of 14 images with three questions each the search has whole ones: 15 questions, where a third would be 14."""
    asked = [
        Sample((Path(f"{i}.png"),), f"{task} {k}", "a", task)
        for task in "ab"
        for i in range(7 * (task == "b"), 7 + 7 * (task == "b"))
        for k in range(3)
    ]
    ordered = mixed(asked, seed=2)
    count = search_count(ordered)
    searched, fresh = ({sample.images for sample in part} for part in (ordered[:count], ordered[count:]))
    assert count == 15 and not searched & fresh and len(searched) == 5 and len(fresh) == 9
    assert search_count(asked[::3]) == 14 // 3
    check_sample_count(ordered)
    for spoilt in ([replace(own, images=asked[0].images) for own in asked], [*ordered[:27], *[asked[-1]] * 9]):
        with pytest.raises(CodebookError, match="too few samples to confirm a gain with: give 6 of each task, of as"):
            check_sample_count(spoilt)


def test_questions_about_one_image_are_one_draw():
    """Differences 0.1 and 0.3 of two images, asked twice: of two draws the error is 0.1, of four it would be 0.06."""
    images = [(Path(name),) for name in "aabb"]
    run = Search(None, None, [Sample(own, "", "x") for own in images], Journal(None, {}), lambda count: None)
    one, other = Schedule([Stage(0, 1, Random())]), Schedule([Stage(0, 2, Random())])
    run.values = {str(one): dict(enumerate((0.5, 0.6, 0.9, 0.8))), str(other): dict(enumerate((0.4, 0.5, 0.6, 0.5)))}
    assert run.difference(one, other, range(4)) == pytest.approx((0.2, 0.1))


def test_paired_differences_by_task():
    """By hand: task a has differences 0.1 and 0.3, mean 0.2, variance 0.02; task b has one, 0.4."""
    run = Search(None, None, [Sample((), "", "x", task) for task in "aabb"], Journal(None, {}), lambda count: None)
    one, other = Schedule([Stage(0, 1, Random())]), Schedule([Stage(0, 2, Random())])
    run.values = {str(one): {0: 0.5, 1: 0.9, 2: 0.8, 3: 0.8}, str(other): {0: 0.4, 1: 0.6, 2: 0.4, 3: 0.4}}
    assert run.difference(one, other, range(4)) == pytest.approx((0.3, np.sqrt(0.02 / 2) / 2))
    assert run.mean(one, range(4)) == pytest.approx(0.75)


def test_a_second_task_about_the_same_images_is_no_second_test():
    images = [(Path(name),) for name in "abcd"]
    run = Search(None, None, [Sample(own, "", "x", t) for t in "st" for own in images], Journal(None, {}), print)
    one, other = Schedule([Stage(0, 1, Random())]), Schedule([Stage(0, 2, Random())])
    run.values = {str(one): dict(enumerate([0.5, 0.6, 0.9, 0.8] * 2)), str(other): dict.fromkeys(range(8), 0.4)}
    assert run.difference(one, other, range(8)) == pytest.approx(run.difference(one, other, range(4)))
