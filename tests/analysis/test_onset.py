"""The onset of known curves, its rank correlation by hand, and its attention and losses against plain forwards."""

import json

import numpy as np
import pytest
import torch

from codebook import load
from codebook.analysis import agreements, onsets
from codebook.analysis.onset import onset_table, rank_correlation, regions
from codebook.errors import CodebookError
from codebook.inference.prompts import answer_ids, prepare_samples
from codebook.inference.samples import Sample
from codebook.miniature.samples import of_miniature
from codebook.models import Image
from codebook.models.layout import Grid, Layout
from tests.journals import read_journal


def test_rank_correlation_by_hand():
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    x = torch.tensor([[1.0, 5.0, 6.0, 9.0], [4.0, 3.0, 2.0, 1.0]])
    y = torch.tensor([20.0, 10.0, 40.0, 30.0])
    assert rank_correlation(x, y).tolist() == pytest.approx([0.6, -0.6])
    # Ranks 1.5 1.5 3.5 3.5, less their mean -1 -1 1 1, and -0.5 -1.5 1.5 0.5: 4 / (2 * sqrt 5)
    assert float(rank_correlation(torch.tensor([1.0, 1.0, 2.0, 2.0]), y)) == pytest.approx(2 / 5**0.5)
    assert float(rank_correlation(torch.ones(4), y)) == 0


def test_regions_by_hand():
    def image(*grids):
        layout = Layout(sum(grid.count for grid in grids), grids)
        return Image("image", layout, tuple(range(layout.count)))

    found = regions(image(Grid(0, 4, 8)))
    assert found.sum(0).tolist() == [1] * 32 and found.sum(1).tolist() == [4] * 8
    assert found[5].nonzero().flatten().tolist() == [18, 19, 26, 27]  # below, the second of four across
    assert regions(image(Grid(0, 8, 4)))[5].nonzero().flatten().tolist() == [18, 19, 22, 23]  # 4 down, 2 across
    for grids in ([Grid(0, 3, 3)], [Grid(0, 4, 8), Grid(32, 4, 8)]):
        with pytest.raises(CodebookError, match="one grid of 2 x 4 tokens or more"):
            regions(image(*grids))


def records(*differences, spread=0.0):
    """Two samples per curve, `spread` above and below it."""
    found = []
    for curve in differences:
        for sign in (1, -1):
            found.append({"own": [x + 0.1 + sign * spread for x in curve], "swapped": [0.1] * len(curve)})
    return found


def test_the_onset_is_the_first_half_of_the_rise():
    curves = records([0.0, 0.1, 0.25, 0.4, 0.2], [0.0, 0.0, 0.0, 0.2, 0.6], spread=0.01)
    found = onsets(["a", "a", "b", "b"], curves)
    assert list(found) == ["a", "b", "mean"]
    assert (found["a"].layer, found["a"].interval) == (2, (2, 2))  # 0.25 of 0.4; the fall behind does not matter
    assert found["b"].layer == 4 and found["mean"].layer == 3  # 0.2 of 0.6 is less than half; 0.3 of 0.4 is more
    assert found["mean"].difference == pytest.approx([0, 0.05, 0.125, 0.3, 0.4]) and found["mean"].samples == 4
    assert found["a"].error == pytest.approx([0.01] * 5)  # 0.01 sqrt 2 over sqrt 2
    text = onset_table(found)
    assert "text guides the choice from layer 3 on: fastv(query='question')@4 asks it" in text


def test_what_does_not_rise_has_no_onset():
    # 0.2 with an error of 0.1: 2 of them, where 5% over five layers asks for 2.33
    found = onsets(["a"] * 2, records([0.0, 0.0, 0.0, 0.2, 0.0], spread=0.1))["a"]
    assert found.layer is None and found.interval is None and "no better with a question of its own" in found.unknown
    assert "a: nothing is known" in onset_table({"a": found}) and "no layer is known" in onset_table({"a": found})
    assert onsets(["a"] * 2, records([0.0, 0.0, 0.0, 0.24, 0.0], spread=0.1))["a"].layer == 3
    assert "one sample" in onsets(["a"], records([0.0, 1.0])[:1])["a"].unknown
    with pytest.raises(CodebookError, match="called `mean`"):
        onsets(["a", "mean"], records([0.0, 1.0]))


def test_questions_about_one_image_are_one_draw():
    curves = records([0.0, 0.1, 0.25, 0.4, 0.2], spread=0.03)
    once, thrice = onsets(["a"] * 2, curves)["a"], onsets(["a"] * 6, curves * 3, images=[0, 1] * 3)["a"]
    assert thrice.error == pytest.approx(once.error) and thrice.interval == once.interval
    assert "one image" in onsets(["a"] * 2, curves, images=[4, 4])["a"].unknown


@pytest.fixture(scope="module")
def samples():
    return of_miniature("train", 0, 1, ["exist", "ocr"])


@torch.no_grad()
def test_agreements_equal_plain_forwards(samples, tmp_path):
    """Attention from the stock eager maps, losses from forwards with a region's columns masked."""
    model, processor = load("miniature", "cpu")
    found = agreements(model, processor, samples, tmp_path / "onset.sqlite")
    model.set_attn_implementation("eager")
    for i, sample in enumerate(samples):
        inputs = prepare_samples(model, processor, [sample]).inputs
        target = answer_ids(processor, sample)[0]
        image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
        last = inputs["input_ids"].shape[1]

        def loss(mask, inputs=inputs, target=target):
            return -model(**dict(inputs) | {"attention_mask": mask}).logits[0, -1].log_softmax(-1)[target]

        worth = []
        rows, cols = torch.arange(144) // 12, torch.arange(144) % 12
        for down in range(2):
            for across in range(4):
                mask = inputs["attention_mask"].clone()
                mask[0, image[(rows // 6 == down) & (cols // 3 == across)]] = 0
                positions = torch.arange(last)[None]
                logits = model(**dict(inputs) | {"attention_mask": mask}, position_ids=positions).logits
                worth.append(float(-logits[0, -1].log_softmax(-1)[target] - loss(inputs["attention_mask"])))
        for name, asked in (("own", sample), ("swapped", Sample(sample.images, samples[1 - i].question))):
            given = prepare_samples(model, processor, [asked]).inputs
            maps = model(**given, output_attentions=True).attentions
            expected = []
            for attention in maps:
                got = attention[0].mean(0)[image[-1] + 1 :, image].sum(0).view(2, 6, 4, 3).sum((1, 3)).flatten().numpy()
                expected.append(np.corrcoef(np.argsort(np.argsort(got)), np.argsort(np.argsort(worth)))[0, 1])
            assert found[i][name] == pytest.approx(expected, abs=1e-6)
    model.set_attn_implementation("sdpa")
    again = agreements(model, processor, samples, tmp_path / "onset.sqlite")
    assert again == found and list(read_journal(tmp_path / "onset.sqlite")[1]) == ["0", "1"]


def test_questions_that_are_all_the_same_are_refused(samples):
    model, processor = load("miniature", "cpu")
    with pytest.raises(CodebookError, match="two different ones"):
        agreements(model, processor, samples[:1])
    several = Sample(samples[1].images * 2, samples[1].question, samples[1].answer)
    begun = []
    with pytest.raises(CodebookError, match="one image each"):
        agreements(model, processor, [samples[0], several], done=begun.append)
    assert not begun


def test_the_command_shows_and_writes_it(run, tmp_path):
    out = tmp_path / "out"
    data = tmp_path / "data.jsonl"
    lines = []
    for i, sample in enumerate(of_miniature("train", 0, 1, ["exist", "loc"])):
        sample.pictures()[0].save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": sample.question, "answer": sample.answer}))
    data.write_text("\n".join(lines) + "\n")
    code, shown, _ = run("horizon", "miniature", "--data", data, "--out", out, "--onset")
    assert code == 0 and "swapped" in shown
    report = json.loads((out / "horizon.json").read_text())
    assert len(report["onsets"]["all"]["own"]) == 12 and report["onsets"]["all"]["samples"] == 2
    assert np.isfinite(report["onsets"]["all"]["own"]).all()
    assert (out / "onset.sqlite").exists()
    code, _, err = run("horizon", "miniature", "--data", data, "--onset", "--metric", "generated")
    assert code == 2 and "leave it out" in err
