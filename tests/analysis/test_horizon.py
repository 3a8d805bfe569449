"""Horizons of known curves, of a model that goes blind at a known layer, and sweeps against pruned forwards."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from codebook import load, models
from codebook.analysis import Sweep, horizons, plot, sweep, telling
from codebook.analysis.horizon import Horizon, first_safe, horizon_table, layer_runs, resampled
from codebook.analysis.layer_sweep import guess_rates
from codebook.errors import CodebookError
from codebook.inference.prompts import answer_ids, prepare_samples
from codebook.inference.samples import Sample
from codebook.miniature.samples import of_miniature
from codebook.pruning import Drop, Schedule, Stage
from tests.analysis.conftest import LAYERS, READS
from tests.journals import read_journal


@pytest.fixture(scope="module")
def samples():
    """Two of each of three families; those of the last have no answer."""
    chosen = [s for s in of_miniature("train", 0, 2) if s.task in ("exist", "rel", "ocr")]
    return [Sample(s.images, s.question, None if s.task == "ocr" else s.answer, s.task) for s in chosen]


def test_first_safe_of_known_curves():
    curves = [
        ([0.9, 0.5, 0.2, 0.01, 0.0], 3),
        ([0.9, 0.0, 0.0, 0.3, 0.0], 4),  # small losses before a large one are not safe
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0),
        ([0.9, 0.5, 0.4, 0.3, 0.2], 5),  # nowhere
        ([0.9, -0.5, 0.0, -0.3, 0.05], 1),  # at most eps: a gain is no loss, and eps itself is allowed
    ]
    losses, layers = zip(*curves, strict=True)
    assert first_safe(np.array(losses), 0.05).tolist() == list(layers)
    assert [int(first_safe(np.array(loss), 0.05)) for loss in losses] == list(layers)


def test_a_hand_made_sweep():
    """Two tasks of two samples and four layers, all samples of a task alike: nothing to resample."""
    full, pruned = np.ones(4), np.array([[0.0, 1.0, 0.6, 1.0]] * 2 + [[0.0, 0.2, 1.0, 1.1]] * 2)
    found = horizons(Sweep(["a", "a", "b", "b"], full, pruned), 0.05, margin=1)
    assert list(found) == ["a", "b", "mean"]
    a, b, mean = found.values()
    assert (a.layer, a.interval, a.safe, a.early, a.gains) == (3, (3, 3), 4, [1], [])
    assert (b.layer, b.interval, b.safe, b.early, b.gains) == (2, (2, 2), 3, [], [3])
    assert (mean.layer, mean.samples, mean.full) == (3, 4, 1.0)
    assert mean.loss == pytest.approx([1, 0.4, 0.2, -0.05]) and mean.error == [0, 0, 0, 0]
    shown = horizon_table(found, 4)
    assert "a: not monotone, the loss is small at layer 1 too" in shown
    assert "b: removing all visual tokens helps at layer 3" in shown and "no layer is safe for every task" in shown


def test_tasks_weigh_the_same_in_the_mean_and_errors_are_paired():
    full = np.array([1.0, 0.0, 1.0])
    pruned = np.array([[0.5], [-0.5], [0.8]])  # losses 0.5, 0.5 and 0.2: paired, the first task's do not spread
    found = horizons(Sweep(["a", "a", "b"], full, pruned), 0.1)
    assert found["mean"].loss == pytest.approx([0.35])
    assert found["a"].error == pytest.approx([0]) and found["b"].error == [None]
    apart = horizons(Sweep(["a"] * 4, np.array([1.0, 1, 0, 0]), np.zeros((4, 1))), 0.1)["a"]
    assert apart.error == pytest.approx([(1 / 3) ** 0.5 / 2])


def test_the_interval_is_that_of_a_plain_bootstrap():
    rng = np.random.default_rng(5)
    loss = np.clip(rng.normal([0.6, 0.3, 0.06, 0.04, 0.02, 0.0], 0.3, (40, 6)), -1, 1)
    drawn = [first_safe(loss[rng.integers(0, 40, 40)].mean(0), 0.05) for _ in range(4000)]
    expected = tuple(np.quantile(drawn, [0.025, 0.975]).round().astype(int))
    own = Sweep(["all"] * 40, np.zeros(40), -loss)
    found = horizons(own, 0.05, seed=1)["all"]
    assert found.interval == expected and expected[0] < expected[1]
    assert horizons(own, 0.05, seed=1)["all"] == found
    assert list(horizons(own, 0.05)) == ["all"]  # one task: no mean over tasks


def test_questions_about_one_image_are_one_draw():
    """Each image's question asked three times over says no more than once."""
    rng = np.random.default_rng(5)
    loss = np.clip(rng.normal([0.6, 0.3, 0.06, 0.04, 0.02, 0.0], 0.3, (20, 6)), -1, 1)
    once = horizons(Sweep(["all"] * 20, np.zeros(20), -loss), 0.05)["all"]
    told = Sweep(["all"] * 60, np.zeros(60), -np.repeat(loss, 3, 0), images=[i // 3 for i in range(60)])
    thrice = horizons(told, 0.05)["all"]
    assert thrice.interval == once.interval and thrice.error == pytest.approx(once.error)
    assert thrice.error == pytest.approx(loss.std(0, ddof=1) / 20**0.5)
    apart = horizons(Sweep(["all"] * 60, np.zeros(60), told.pruned), 0.05)["all"]
    assert all(np.less(apart.error, np.multiply(once.error, 0.6)))
    alone = horizons(Sweep(["all"] * 3, np.ones(3), np.zeros((3, 2)), images=[7] * 3))["all"]
    assert "one image shows no spread" in alone.unknown and alone.error == [None, None]


def test_tasks_about_the_same_images_are_resampled_together():
    """A second task with the same losses on the same images says no more than the first, and half of it no less."""
    rng = np.random.default_rng(5)
    loss = np.clip(rng.normal([0.6, 0.3, 0.06, 0.04, 0.02, 0.0], 0.3, (40, 6)), -1, 1)
    images, tasks, every = [*range(40)] * 2, ["a"] * 40 + ["b"] * 40, np.concatenate([loss, loss])
    twice = horizons(Sweep(tasks, np.zeros(80), -every, images=images), 0.05)
    assert twice["a"].interval == twice["b"].interval == twice["mean"].interval
    assert twice["mean"].error == pytest.approx(twice["a"].error)
    apart = horizons(Sweep(tasks, np.zeros(80), -every), 0.05)["mean"]
    assert apart.error == pytest.approx(np.divide(twice["a"].error, 2**0.5))
    few = [(loss, np.arange(40)), (loss[:20], np.arange(20))]
    means = np.mean(resampled(few, rng, 4000), 0)
    times = rng.multinomial(40, np.full(40, 1 / 40), 4000)
    drawn = (times @ loss / 40 + times[:, :20] @ loss[:20] / times[:, :20].sum(1, keepdims=True)) / 2
    assert means.std(0) == pytest.approx(drawn.std(0), rel=0.07)
    assert np.isfinite(resampled([few[0], (loss[:1], np.arange(1))], rng, 100)[1]).all()  # none drawn of the second


def test_the_horizon_of_a_model_that_goes_blind(model, processor, samples):
    own = [Sample(s.images, s.question, None, s.task) for s in samples if s.task != "rel"]
    found = horizons(sweep(model, processor, own)[0], 1e-6, margin=0)
    assert {task: (one.layer, one.interval) for task, one in found.items()} == dict.fromkeys(
        found, (READS, (READS,) * 2)
    )
    assert found["mean"].loss[READS - 1] > 0.1 and found["mean"].loss[READS:] == pytest.approx([0] * 3, abs=1e-6)


def test_a_sweep_equals_pruned_forwards(model, processor, samples):
    swept, cost = sweep(model, processor, samples)
    right, _ = sweep(model, processor, samples, "accuracy")
    for i, sample in enumerate(samples):
        inputs = prepare_samples(model, processor, [sample]).inputs
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
            target = logits.argmax() if sample.answer is None else answer_ids(processor, sample)[0]
            assert swept.full[i] == pytest.approx(float(logits.softmax(-1)[target]), abs=1e-6)
            for layer in range(1, LAYERS):
                with Schedule([Stage(layer, 0, Drop())])(model):
                    pruned = model(**inputs).logits[0, -1]
                assert swept.pruned[i, layer] == pytest.approx(float(pruned.softmax(-1)[target]), abs=1e-6)
                assert right.pruned[i, layer] == float(pruned.argmax() == target)
    own = [full for sample, full in zip(samples, right.full, strict=True) if sample.answer is None]
    assert own == [1, 1]  # without an answer the model's own is the right one
    assert 0 < cost.processed < cost.naive


def test_what_all_answers_of_a_task_begin_with_is_passed_over(model, processor, samples):
    images = [sample.images for sample in samples[:2]]
    asked = [
        Sample(own, "describe.", f"red {shape}", "cap") for own, shape in zip(images, ("circle", "square"), strict=True)
    ]
    swept, _ = sweep(model, processor, asked)
    for i, sample in enumerate(asked):
        inputs = dict(prepare_samples(model, processor, [sample]).inputs)
        first, second = answer_ids(processor, sample)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[first]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
            assert swept.full[i] == pytest.approx(float(logits.softmax(-1)[second]), abs=1e-6)
            with Schedule([Stage(READS - 1, 0, Drop())])(model):
                pruned = model(**inputs).logits[0, -1]
            assert swept.pruned[i, READS - 1] == pytest.approx(float(pruned.softmax(-1)[second]), abs=1e-6)


def test_the_telling_token_of_an_answer(monkeypatch):
    words = ["", " ", "9", "4", "yes", "the", "cat"]
    processor = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: words[ids[0]]))
    monkeypatch.setattr(telling, "answer_ids", lambda _, sample: [words.index(word) for word in sample.answer])
    answers = {
        "numbers": [[" ", "9", " ", "4"], [" ", "4"]],  # as Llama's tokenizers write digits
        "mixed": [["yes"], [" ", "9"]],
        "articles": [["the", "cat"], ["the", "9"], ["the"]],
        "same": [["yes"], ["yes"]],
    }
    samples = [Sample((None,), "?", answer, task) for task, own in answers.items() for answer in own]
    found = [[words[i] for i in ids] for ids in telling.telling_tokens(processor, [*samples, Sample((None,), "?")])]
    assert found == [
        [" ", "9"], [" ", "4"], ["yes"], [" ", "9"], ["the", "cat"], ["the", "9"], ["the"], ["yes"], ["yes"], []
    ]  # fmt: skip


def test_answers_are_scored_by_generation(samples):
    loaded, own = load("miniature", "cpu")
    one = [sample for sample in samples if sample.task == "exist"]
    swept, cost = sweep(loaded, own, one, "generated")
    assert swept.start == 1 and swept.pruned.shape == (2, swept.layers - 1) and not cost.processed
    assert set(np.unique(swept.pruned)) <= {0.0, 1.0}
    found = horizons(swept, 0.05)["exist"]
    assert 1 <= found.layer <= found.safe <= swept.layers


def test_a_sweep_goes_on_where_it_was(model, processor, samples, tmp_path):
    file, seen = tmp_path / "new" / "sweep.sqlite", []

    def stop(count):
        seen.append(count)
        if count == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(model, processor, samples, file=file, done=stop)
    again, cost = sweep(model, processor, samples, file=file)
    whole, all_ = sweep(model, processor, samples)
    assert np.array_equal(again.pruned, whole.pruned) and np.array_equal(again.full, whole.full)
    assert 0 < cost.processed < all_.processed
    assert list(read_journal(file)[1]) == list("012345")
    assert sweep(model, processor, samples, file=file)[1].processed == 0
    with pytest.raises(CodebookError, match="another data"):
        sweep(model, processor, samples[1:], file=file)
    file.write_text("not a journal\n")
    with pytest.raises(CodebookError, match="no journal"):
        sweep(model, processor, samples, file=file)


def test_the_curve_is_drawn(tmp_path):
    full, pruned = np.ones(3), np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 0.5]])
    plot.draw_horizons(horizons(Sweep(["a", "a", "b"], full, pruned)), 0, "probability", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_legend_lies_within_the_picture_and_over_no_other_words(tmp_path, monkeypatch, count):
    from matplotlib.figure import Figure

    seen, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **more: seen.append(figure) or save(figure, *given))
    one = Horizon(9, 1.0, [0.1, 0.9], [0.9, 0.0], [0.1, 0.1], 1, (1, 2), 1, [], [])
    plot.draw_horizons({f"task {i}": one for i in range(count)}, 0, "probability", tmp_path / "curve.png")
    [figure] = seen
    page, legend = figure.bbox, figure.legends[0].get_window_extent()
    assert page.x0 <= legend.x0 and legend.x1 <= page.x1 and legend.y1 <= page.y1
    words = [figure._supylabel.get_window_extent(), *(panel.get_tightbbox() for panel in figure.axes[:count])]
    assert not any(legend.overlaps(box) for box in words)


def test_answers_that_are_wrong_or_guessed_show_no_horizon(tmp_path):
    """Nothing is lost where nothing was right: such a curve must not say that pruning is safe."""
    flat = np.full((40, 4), 0.02)
    right = np.array([0.0] * 40 + [1.0] * 40 + ([1.0, 0.0] * 20) + [1.0] * 40)
    tasks = ["wrong"] * 40 + ["same"] * 40 + ["chance"] * 40 + ["seen"] * 40
    seen = np.tile([0.1, 0.3, 0.9, 0.9], (40, 1))
    own = Sweep(tasks, np.array([0.02] * 120 + [0.9] * 40), np.concatenate([flat, flat, flat, seen]), 0, right,
                {"wrong": 0.0, "same": 1.0, "chance": 0.5, "seen": 0.5})  # fmt: skip
    found = horizons(own, margin=1)
    assert found["seen"].unknown is None and (found["seen"].layer, found["seen"].safe) == (2, 3)
    for task in ("wrong", "same", "chance", "mean"):
        assert (found[task].layer, found[task].interval, found[task].safe) == (4, (0, 4), 4)
        shown = found[task].as_json()
        assert shown["layer"] is shown["interval"] is shown["safe"] is None and shown["unknown"] == found[task].unknown
    assert "answers 0 of 40 right" in found["wrong"].unknown and "a guess 50%" in found["chance"].unknown
    assert "chance, same, wrong" in found["mean"].unknown
    text = horizon_table(found, 4)
    assert "wrong: nothing is known: the unpruned model answers 0 of 40" in text
    assert [line.split()[3:] for line in text.splitlines()[1:5]] == [
        ["unknown"] * 3,
        ["unknown"] * 3,
        ["2", "2-2", "3"],
        ["unknown"] * 3,
    ]
    assert text.splitlines()[-1].endswith("nothing is known for chance, same, wrong")
    plot.draw_horizons(found, 0, "probability", tmp_path / "curve.png")
    bare = Sweep(tasks, own.full, own.pruned)
    assert horizons(bare)["wrong"].layer == 0  # a sweep that does not know what was right is taken at its word


def test_one_sample_shows_no_horizon():
    found = horizons(Sweep(["a", "b", "b"], np.ones(3), np.zeros((3, 2))))
    assert "one sample" in found["a"].unknown and found["a"].safe == 2 and found["b"].unknown is None


def test_a_task_is_not_overwritten_by_the_mean():
    with pytest.raises(CodebookError, match="called `mean`"):
        horizons(Sweep(["a", "mean"], np.ones(2), np.zeros((2, 2))))
    with pytest.raises(CodebookError, match="called `mean`"):  # and not after the long sweep
        sweep(None, None, [Sample((), "q", "a", task) for task in ("a", "mean")])


def test_the_rate_of_guesses_by_hand():
    """Five samples: `no` is right for two of the other four; all answers differ; a sample without an answer."""
    asked = {"a": ["no", "yes", "no", "no", "x"], "b": ["1", "2", "3"], "c": [None, None], "d": ["u", "u", None]}
    samples = [Sample((), "q", answer, task) for task, own in asked.items() for answer in own]
    assert guess_rates(samples) == {"a": 0.5, "b": 0.0, "d": 0.5}


def test_a_model_that_is_wrong_is_not_safe_to_prune(samples):
    """End to end: right questions with wrong answers, by each metric."""
    loaded, own = models.load("miniature", "cpu")
    colours = ["red", "blue", "green", "yellow", "purple", "orange"]
    asked = [
        Sample(s.images, s.question, colour, "exist")
        for s, colour in zip(of_miniature("test", 0, 6, ["exist"]), colours, strict=True)
    ]
    for metric in ("probability", "accuracy", "generated"):
        found = horizons(sweep(loaded, own, asked, metric)[0])["exist"]
        assert "answers 0 of 6 right" in found.unknown and found.safe == 12


def test_neighbouring_layers_are_joined():
    assert layer_runs([0, 2, 3, 4, 7, 8]) == "0, 2-4, 7-8" and layer_runs([]) == ""


def test_no_samples():
    with pytest.raises(CodebookError, match="no samples"):
        sweep(None, None, [])
