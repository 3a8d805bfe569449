"""Metrics by hand, their intervals by resampling."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from PIL import Image

from codebook.cli.data import load_data
from codebook.evaluation.metrics import (
    ACCURACY,
    CHAIR,
    MME,
    POPE,
    Task,
    estimate,
    estimates,
    mean_of,
    numbers_of_groups,
    says_yes,
    yes_or_no,
)
from codebook.evaluation.scores import TaskScores, accuracy_table, mean_text, scored, standard_error
from codebook.inference.captions import CaptionScorer, Vocabulary
from codebook.inference.respond import Response
from codebook.inference.samples import Sample, image_numbers
from codebook.miniature.samples import SCORERS


def samples(*answers, images=None):
    return [Sample((), str(i), answer, "t", yes_or_no) for i, answer in enumerate(answers)]


def values(metric, task, texts):
    return dict(zip(metric.names, metric.values(task.sums(texts).mean(0)), strict=True))


def test_accuracy_is_the_mean_of_the_scores_and_its_error_that_of_a_mean():
    task = Task("t", samples("yes", "yes", "no", "no", "yes"), ACCURACY)
    found = estimate(ACCURACY, task.sums(["yes", "no", "no", "yes", "yes"]))
    assert found.value == pytest.approx(3 / 5)
    assert found.error == pytest.approx(np.std([1, 0, 1, 0, 1], ddof=1) / 5**0.5, rel=1e-5)
    wilson = estimate(ACCURACY, np.array([[1.0, 1]] * 60 + [[0.0, 1]] * 40))
    assert wilson.interval == pytest.approx([0.5020, 0.6906], abs=1e-3)  # of 60 in 100
    sure = estimate(ACCURACY, task.sums(["yes", "yes", "no", "no", "yes"]))
    assert sure.error == pytest.approx(0) and sure.interval == pytest.approx([5 / (5 + 1.96**2), 1])


@pytest.mark.parametrize(("score", "images"), [(8 / 9, 7), (0.9, 3), (0.5, 4), (1.0, 5)])
def test_images_that_are_all_alike_have_the_interval_of_as_many_answers(score, images):
    """Rounding makes a mean of equal scores another number; it shows no spread, and no certainty either."""
    found = estimate(ACCURACY, np.array([[score, 1.0]] * images))
    z, n = 1.96, images
    centre, half = score + z**2 / (2 * n), z * (score * (1 - score) / n + z**2 / (4 * n**2)) ** 0.5
    assert found.interval == pytest.approx([(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)])


@pytest.mark.parametrize(
    ("text", "yes"),
    [("Yes", 1), ("yes, there is", 1), ("No.", 0), ("There is not. Yes", 0), ("no", 0), ("maybe", 1), ("Yes. No.", 1)],
)
def test_pope_reads_the_first_sentence(text, yes):
    assert says_yes(text) == yes


def test_pope_by_hand():
    task = Task("t", samples("yes", "yes", "yes", "no", "no"), POPE)
    found = values(POPE, task, ["yes", "yes", "no", "yes", "no"])  # two hits, a miss, a false alarm, one rightly no
    expected = {"f1": 2 / 3, "accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "yes_share": 3 / 5}
    assert found == pytest.approx(expected)
    assert values(POPE, task, ["no"] * 5)["f1"] == 0


def test_chair_by_hand():
    """Three captions with 3, 2 and 0 mentions, of which 1, 0 and 0 are false; 2, 3 and 1 objects, of which 2, 1 and 0
    are named."""
    cap = CaptionScorer(Vocabulary({"cat": "cat", "kitten": "cat", "dog": "dog", "hot dog": "hot dog"}).count)
    shown = [("cat", "hot dog"), ("dog", "cat", "hot dog"), ("dog",)]
    task = Task("t", [Sample((), "q", own[0], "t", cap, own) for own in shown], CHAIR)
    texts = ["A kitten eats hot dogs beside a dog.", "Dogs and a dog.", "Nothing."]
    found = values(CHAIR, task, texts)
    scores = [2 * (2 / 3) * 1 / (2 / 3 + 1), 2 * 1 * (1 / 3) / (1 + 1 / 3), 0]  # of precision and recall
    expected = {"accuracy": sum(scores) / 3, "chair_s": 1 / 3, "chair_i": 1 / 5, "recall": 3 / 6}
    assert found == pytest.approx(expected)
    # an interval for each value: CHAIR_S is a mean of 1, 0, 0
    every = estimates(CHAIR, task.sums(texts))
    assert every[1].error == pytest.approx(np.std([1, 0, 0], ddof=1) / 3**0.5, rel=1e-5)
    assert [one.value for one in every] == pytest.approx(list(expected.values()))


def test_chair_of_the_miniature_by_hand():
    """A circle is in a picture with a red circle, a blue one is not; the caption's own score is F1 over its phrases."""
    answer = "red circle, green ring, number"
    task = Task("cap", [Sample((), "describe.", answer, "cap", SCORERS["cap"])] * 2, CHAIR)
    found = values(CHAIR, task, ["red circle, blue circle, number", "circle, green ring"])
    expected = {"accuracy": (4 / 6 + 2 / 5) / 2, "chair_s": 1 / 2, "chair_i": 1 / 5, "recall": (2 + 2) / 6}
    assert found == pytest.approx(expected)


def test_samples_that_share_any_image_are_one_group(tmp_path):
    """The first shares c with the fourth, which shares d with the last; samples without images stand alone."""
    shown = ["ac", "b", "", "cd", "", "eb", "f", "d"]
    own = [Sample(tuple(tmp_path / name for name in names), "q", "yes", "t", yes_or_no) for names in shown]
    assert Task("t", own, ACCURACY).groups == [[0, 3, 7], [1, 5], [2], [4], [6]]


def test_copies_of_a_file_are_one_image(tmp_path):
    """As where a data set was unpacked into a file per question."""
    for name, content in {"a": b"one", "b": b"two", "c": b"one", "d": b"three"}.items():
        (tmp_path / name).write_bytes(content)
    own = [Sample((tmp_path / name,), "q", "yes", "t", yes_or_no) for name in "abcd"]
    assert Task("t", own, ACCURACY).groups == [[0, 2], [1], [3]]


def test_open_pictures_of_the_same_pixels_are_one_image():
    """As the miniature draws one scene for the questions of several families."""
    shades = [1, 2, 1, 3]
    own = [Sample((Image.new("RGB", (4, 4), (shade, 0, 0)),), "q", "yes", str(i)) for i, shade in enumerate(shades)]
    assert image_numbers(own) == [0, 1, 0, 2]
    grey = replace(own[0], images=(own[0].images[0].convert("L"),))
    assert image_numbers([grey, *own]) == [0, 1, 2, 1, 3]
    tasks = load_data(["miniature:exist", "miniature:count"], 12)
    scenes = [[sample.pictures()[0].tobytes() for sample in task.samples] for task in tasks]
    numbers = numbers_of_groups(tasks)
    shared = len(set(scenes[0]) & set(scenes[1]))
    assert shared > 0 and len(set(numbers[0]) & set(numbers[1])) == shared


def test_mme_counts_questions_and_images(tmp_path):
    pictures = [tmp_path / name for name in "abc" for _ in range(2)]
    own = [Sample((p,), "q", a, "t", yes_or_no) for p, a in zip(pictures, ["yes", "no"] * 3, strict=True)]
    task = Task("t", own, MME)
    found = values(MME, task, ["Yes", "No", "yes", "yes", "other", "no"])  # one image of three wholly right
    assert found == pytest.approx({"score": (4 / 6 + 1 / 3) / 2, "accuracy": 4 / 6, "accuracy_plus": 1 / 3})
    assert task.groups == [[0, 1], [2, 3], [4, 5]]
    for path in set(pictures):
        path.write_bytes(b"the same")  # copies are one draw, and as many pairs as names
    again = Task("t", own, MME)
    assert again.groups == [[0, 1, 2, 3, 4, 5]]
    assert values(MME, again, ["Yes", "No", "yes", "yes", "other", "no"]) == pytest.approx(found)


def test_mme_reads_the_first_four_letters():
    said = {"Yes, it is": 1, "yes": 1, "No": 0, "The yes": 0, "a yes": 0, "": 0}
    assert {text: yes_or_no(text, ["yes"]) for text in said} == said


def test_intervals_are_those_of_a_bootstrap_over_images(tmp_path):
    """F1 is no mean: the delta method against resampling whole images."""
    rng = np.random.default_rng(0)
    images = [tmp_path / str(i // 3) for i in range(600)]
    own = [Sample((p,), "q", "yes" if rng.random() < 0.5 else "no", "t", yes_or_no) for p in images]
    hard = rng.random(200) < 0.3  # images on which most is wrong: questions about one image are no independent draws
    texts = [
        s.answer if rng.random() < (0.3 if hard[i // 3] else 0.95) else {"yes": "no", "no": "yes"}[s.answer]
        for i, s in enumerate(own)
    ]
    sums = Task("t", own, POPE).sums(texts)
    found = estimate(POPE, sums)
    drawn = rng.multinomial(200, np.full(200, 1 / 200), 4000) @ sums
    assert found.error == pytest.approx(POPE.values(drawn)[:, 0].std(), rel=0.06)
    alone = [Sample((), "q", s.answer, "t", yes_or_no) for s in own]
    assert estimate(POPE, Task("t", alone, POPE).sums(texts)).error < 0.85 * found.error


def test_differences_are_paired_and_tasks_weigh_the_same():
    task = Task("t", samples(*["yes", "no"] * 50), ACCURACY)
    some = ["yes"] * 100
    better = ["no" if i == 1 else text for i, text in enumerate(some)]
    a, b = (estimate(ACCURACY, task.sums(texts)) for texts in (better, some))
    assert (a - b).value == pytest.approx(0.01) and (a - b).error == pytest.approx(0.01, rel=0.02)
    assert a.error == pytest.approx(0.05, rel=0.02)
    assert mean_of([a, b]) == pytest.approx((0.505, np.hypot(a.error, b.error) / 2))


def test_seeds_are_averaged():
    task = Task("t", samples("yes", "yes"), ACCURACY)
    runs = [task.sums(["yes", "no"]), task.sums(["no", "yes"])]
    found = estimate(ACCURACY, np.mean(runs, axis=0))
    assert found.value == pytest.approx(0.5) and found.error == pytest.approx(0)


def alone(**tasks):
    """Scores of samples each of which has its own image."""
    numbers = count()
    return {task: TaskScores(values, [next(numbers) for _ in values]) for task, values in tasks.items()}


def test_the_standard_error_of_few_samples():
    assert standard_error(alone(a=[1.0, 0.0] * 8, b=[1.0, 0.0] * 8)) == pytest.approx(0.5 / 15**0.5 / 2**0.5)
    assert standard_error(alone(a=[1.0, 0.0], b=[1.0])) is None
    assert standard_error(alone(a=[1.0] * 30)) == pytest.approx(0.1 / 1.96)  # 3 in 30
    table = accuracy_table({"one": alone(a=[1.0]), "more": alone(a=[1.0] * 30)})
    assert "| one | 100.0 | 100.0 (unknown) |" in table and "| more | 100.0 | 100.0 (5.1) |" in table
    assert mean_text(alone(a=[1.0])) == "1.000 (unknown)" and mean_text(alone(a=[0.0, 1.0] * 50)) == "0.500 (0.050)"


def test_questions_about_one_image_are_one_draw_in_tables_too(tmp_path):
    """As a bootstrap over images has it, and as the estimates of the bench."""
    rng = np.random.default_rng(0)
    shown = [tmp_path / str(i // 3) for i in range(120)]
    own = [Sample((path,), "q", "yes", "t", yes_or_no) for path in shown]
    hard = rng.random(40) < 0.4
    texts = ["yes" if rng.random() < (0.1 if hard[i // 3] else 0.9) else "no" for i in range(120)]
    scores = scored(own, [Response(text, []) for text in texts])
    error = standard_error(scores)
    drawn = np.array(scores["t"].values).reshape(40, 3).mean(1)[rng.integers(40, size=(4000, 40))].mean(1)
    assert error == pytest.approx(drawn.std(), rel=0.06)
    assert error == pytest.approx(estimate(ACCURACY, Task("t", own, ACCURACY).sums(texts)).error, rel=1e-5)
    assert error > 1.3 * standard_error(alone(t=scores["t"].values))
    assert standard_error(scored(own[:3], [Response("yes", [])] * 3)) is None  # of one image
    again = [replace(sample, task="u") for sample in own]  # the same questions as another task
    assert standard_error(scored(own + again, [Response(text, []) for text in texts * 2])) == pytest.approx(error)
