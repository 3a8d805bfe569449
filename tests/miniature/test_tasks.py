"""Questions have one right answer, and scorers score by hand-made examples."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from codebook.errors import CodebookError
from codebook.miniature import TASK_FAMILIES, model, score, tasks
from codebook.miniature.scenes import SHAPES, Film, Scene, Thing, film, scene
from codebook.miniature.tasks import TASK_TABLE, make_question, vocabulary
from codebook.models.chat import check_words

ROOT = Path(__file__).parents[2]


def picture(*things):
    return Scene(np.zeros((96, 96, 3), np.uint8), things)


@pytest.mark.parametrize(
    ("family", "prediction", "answer", "expected"),
    [
        ("exist", "yes", "yes", 1),
        ("exist", " Yes. ", "yes", 1),
        ("exist", "no", "yes", 0),
        ("exist", "yes no", "yes", 0),
        ("ocr", "4 7 2", "4 7 2", 1),
        ("ocr", "4 7", "4 7 2", 0),
        ("loc", "a1", "a1", 1),
        ("box", "p0 p0 p3 p3", "p0 p0 p3 p3", 1),
        ("box", "p0 p0 p3 p1", "p0 p0 p3 p3", 1),  # half of it
        ("box", "p0 p0 p3 p0", "p0 p0 p3 p3", 0),  # a quarter
        ("box", "p3 p3 p0 p0", "p0 p0 p3 p3", 0),
        ("box", "p0 p0", "p0 p0 p3 p3", 0),
        ("box", "yes", "p0 p0 p3 p3", 0),
        ("cap", "red circle, blue square", "blue square, red circle", 1),
        ("cap", "red circle", "red circle, red circle", 2 / 3),
        ("cap", "red square", "red circle", 0),
        ("cap", "", "red circle", 0),
    ],
)
def test_scores_by_hand(family, prediction, answer, expected):
    assert score(family, prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize("family", TASK_FAMILIES)
def test_true_answers_score_one_and_use_the_vocabulary(family):
    import re

    words = set(vocabulary())
    for question in tasks(family, "test", 0, 60):
        assert score(family, question.answer, question.answer) == 1
        assert set(re.findall(r"\w+|[^\w\s]+", f"{question.question} {question.answer}")) <= words
        assert len(question.patches) == len(question.images)
        for patches in question.patches:
            assert patches == sorted(set(patches))
            assert all(0 <= place < 144 for place in patches)
        absent = question.answer in ("no", "zero")
        assert any(question.patches) or absent


def test_existence_is_balanced_and_its_negatives_are_hard():
    asked = hard = 0
    answers = Counter()
    for i in range(600):
        scenery = scene("test", 9, i)
        text, answer, _ = make_question(scenery, "exist", np.random.default_rng(i))
        answers[answer] += 1
        words = text.removeprefix("is there a ").removesuffix("?").split()
        if answer == "no" and len(words) == 2 and words[1] in SHAPES:
            asked += 1
            hard += any(t.color == words[0] for t in scenery.things) and any(
                t.shape == words[1] for t in scenery.things
            )
    assert 0.42 < answers["yes"] / 600 < 0.58
    assert hard / asked > 0.4


def test_relations_localization_and_boxes_by_hand():
    red, blue = Thing("circle", "red", "big", 4, 4), Thing("square", "blue", "small", 70, 10)
    scenery = picture(red, blue)
    rng = np.random.default_rng(0)
    for _ in range(20):
        text, answer, patches = make_question(scenery, "rel", rng)
        first = text.split(" relative ")[0]
        assert answer == ("left" if "red" in first or "circle" in first else "right")
        assert patches == (sorted({*red.patches, *blue.patches}),)
        text, answer, patches = make_question(scenery, "loc", rng)
        assert (answer, *patches) in [("a1", red.patches), ("a4", blue.patches)]
        text, answer, _ = make_question(scenery, "box", rng)
        assert answer in ("p1 p1 p4 p4", "p17 p2 p19 p4")
    assert make_question(scenery, "word", rng)[1] == "circle"
    assert make_question(scenery, "cap", rng)[1] == "red circle, blue square"
    assert make_question(scenery, "ocr", rng) is None


def test_albums_by_hand():
    red, blue = Thing("circle", "red", "big", 4, 4), Thing("square", "blue", "small", 70, 10)
    green = Thing("circle", "green", "big", 40, 4)
    rng = np.random.default_rng(0)
    held = {
        "red circle": "one", "green circle": "two", "blue square": "one", "square": "one",
        "red object": "one", "green object": "two", "blue object": "one",
    }  # fmt: skip
    seen = set()
    for _ in range(200):
        question, answer, patches = make_question((picture(red, blue), picture(green)), "multi", rng)
        if "same or different" in question:
            assert question == "is the color of the circle the same or different?" and answer == "different"
            assert patches == (red.patches, green.patches)
        else:
            what = question.removeprefix("which image has a ").removesuffix("?")
            assert answer == held[what]
            seen.add(what)
            assert patches[("one", "two").index(answer) - 1] == []
    assert seen == set(held)
    assert make_question((picture(red), picture(red)), "multi", rng)[1] == "same"


def test_films_by_hand():
    still, new = Thing("square", "blue", "small", 70, 10), Thing("ring", "cyan", "big", 40, 40)
    path = [Thing("circle", "red", "big", 4 + 8 * i, 4) for i in range(4)]
    frames = tuple(picture(mover, still, *[new][: i >= 2]) for i, mover in enumerate(path))
    shot = Film(frames, path[0], "right", new)
    answers = {}
    for i in range(400):
        question, answer, patches = make_question(shot, "video", np.random.default_rng(i))
        answers[question] = answer
        if question == "what appeared?":
            assert patches == ([], [], new.patches, new.patches)
        elif question in ("what moved?", "which way did the circle move?"):
            assert patches == tuple(mover.patches for mover in path)
        elif question == "did the square appear?":
            assert patches == (still.patches,) * 4
    assert answers["what moved?"] == "red circle" and answers["what appeared?"] == "cyan ring"
    for name, moved, appeared in (("circle", "yes", "no"), ("ring", "no", "yes"), ("blue object", "no", "no")):
        assert answers[f"did the {name} move?"] == moved and answers[f"did the {name} appear?"] == appeared
    assert {a for q, a in answers.items() if q.startswith("which way did the")} == {"right"}


def test_films_show_what_they_say():
    for i in range(60):
        shot = film("test", 4, i)
        assert 4 <= len(shot.frames) <= 8
        first, last = shot.frames[0], shot.frames[-1]
        assert shot.newcomer not in first.things and last.things[-1] == shot.newcomer
        there = [shot.newcomer in frame.things for frame in shot.frames]
        assert there == sorted(there)
        lefts, tops = zip(*((frame.things[0].left, frame.things[0].top) for frame in shot.frames), strict=True)
        dx, dy = np.diff(lefts), np.diff(tops)
        sign = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[shot.move]
        assert (np.sign(dx) == sign[0]).all() and (np.sign(dy) == sign[1]).all()
        assert len(set(dx)) == len(set(dy)) == 1
        for one, two in zip(shot.frames, shot.frames[1:], strict=False):
            assert one.things[1 : 1 + len(last.things) - 2] == two.things[1 : 1 + len(last.things) - 2]
            assert not (one.pixels == two.pixels).all()


def test_an_ambiguous_object_is_never_asked_about():
    twins = picture(Thing("circle", "red", "big", 4, 4), Thing("circle", "red", "small", 70, 10))
    for family in ("attr", "loc", "box", "rel"):
        assert make_question(twins, family, np.random.default_rng(0)) is None


def test_an_unknown_family_names_the_known_ones():
    with pytest.raises(CodebookError, match="exist"):
        score("ocrr", "", "")
    with pytest.raises(CodebookError, match="exist"):
        next(tasks("ocrr"))
    assert tuple(TASK_TABLE) == TASK_FAMILIES


def test_what_the_docs_ask_the_miniature_is_in_its_words():
    processor = model.processor()
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    asked = [q for page in pages for q in re.findall(r'codebook \w+ miniature.*--ask "([^"]+)"', page.read_text())]
    assert len(asked) > 5
    for question in asked:
        check_words(processor, question)
