"""Scorers by worked examples of the data sets' own definitions."""

import pytest

from codebook.evaluation.scorers import (
    anls,
    box_overlap,
    contains,
    edits,
    letter,
    named,
    normalised,
    relaxed,
    same,
    vqa,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat.", "cat"),
        ("two", "2"),
        ("None", "0"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("were", "were"),  # no contraction, though we're is one
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("red-ish", "red ish"),  # punctuation inside a word becomes a space,
        ("red - ish", "red ish"),  # and beside a space goes away
        ("(yes)", "yes"),
        ("a\nred\tcar", "red car"),
        ("A.", "a"),  # nothing else is left: the option's letter, and no empty answer
        ("?", "?"),
    ],
)
def test_answers_are_compared_as_the_official_vqa_evaluation_does(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_of_ten_people(agree, expected):
    """With leave-one-out: of n who agree each has n - 1 others and the 10 - n have n, a third each, at most 1."""
    answers = ["two"] * agree + [f"other {i}" for i in range(10 - agree)]
    assert vqa("2.", answers) == pytest.approx(expected)


@pytest.mark.parametrize("people", range(4, 11))
def test_soft_accuracy_leaves_each_person_out(people):
    """Of any number of people from four on, the answer of all scores 1."""
    for agree in range(people + 1):
        given = ["net"] * agree + [f"other {i}" for i in range(people - agree)]
        left = [given[:i] + given[i + 1 :] for i in range(people)]
        expected = sum(min(1, own.count("net") / 3) for own in left) / people
        assert vqa("net", given) == pytest.approx(expected)
    assert expected == 1


def test_one_answer_is_right_or_wrong():
    assert vqa("a dog", ["dog"]) == 1 and vqa("cat", ["dog"]) == 0


def test_same():
    assert same("Yes.", ["yes"]) == 1 and same("yes, it is", ["yes"]) == 0 and same("", ["yes"]) == 0


@pytest.mark.parametrize("answer", ["A", "a.", "the", "?"])
def test_nothing_said_is_no_article(answer):
    assert same(answer, [answer]) == vqa(answer, [answer] * 10) == 1
    assert same("", [answer]) == vqa("", [answer] * 10) == same("an", [answer]) == 0


@pytest.mark.parametrize(
    ("said", "expected"),
    [("red", 1), ("It is Red.", 1), ("red circle", 1), ("red and blue", 0), ("blue", 0), ("reddish", 0), ("", 0)],
)
def test_the_one_word_named_of_a_few(said, expected):
    assert named(said, ["red"], ("red", "blue")) == expected


LED = ["Answer: B", "The answer is B.", "the best answer is: (B)", "The correct option is **B**", "Option B"]


@pytest.mark.parametrize("said", ["B", "B.", "(B)", "B. leaf", " B) leaf", "B: it is B", *LED])
def test_the_letter_of_an_option(said):
    assert letter(said, ["B"]) == 1 and letter(said, ["A"]) == 0


@pytest.mark.parametrize(
    "said", ["leaf", "Because", "b", "", "A B", "Answer", "The answer is leaf", "The answer is not B"]
)
def test_no_letter_or_another(said):
    assert letter(said, ["B"]) == 0


RIGHT = ["[0.100, 0.100, 0.500, 0.500]"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("[0.1, 0.1, 0.5, 0.5]", 1),
        ("[0.1, 0.1, 0.5, 0.301]", 1),  # a little more than half of it
        ("[0.1, 0.1, 0.5, 0.29]", 0),
        ("[0.1, 0.1, 0.899, 0.5]", 1),  # almost twice as wide
        ("[0.1, 0.1, 0.92, 0.5]", 0),
        ("(100,100),(500,500)", 1),  # thousandths
        ("[0.5, 0.5, 0.1, 0.1]", 0),  # inside out
        ("[0.1, 0.1, 0.5]", 0),
        ("nowhere", 0),
        ('[{"bbox_2d": [100, 100, 500, 500], "label": "bowl 3"}]', 1),  # Qwen3-VL's form
        ("2 bowls, the 2nd: <box>[[100, 100, 500, 500]]</box>", 1),
        ("1. [.1, .1, .5, .5].", 1),
        ("1 2 3 bowls 4", 0),
    ],
)
def test_boxes_overlap_by_half_of_their_union(said, expected):
    assert box_overlap(said, RIGHT) == expected


@pytest.mark.parametrize(
    ("a", "b", "steps"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("ab", "ba", 2)]
)
def test_the_distance_in_letters(a, b, steps):
    assert edits(a, b) == edits(b, a) == steps


@pytest.mark.parametrize(
    ("said", "answers", "expected"),
    [
        ("Coca Cola", ["coca cola"], 1),
        ("coca  cola\n", ["Coca Cola", "x"], 1),
        ("coco cola", ["coca cola"], 8 / 9),  # one letter of nine
        ("cola", ["coca cola"], 0),  # five of nine: 4/9 is below one half
        ("kitten", ["sitting", "mitten"], 5 / 6),  # the nearest of 4/7 and 5/6
        ("ab", ["ac"], 0.5),  # exactly one half counts
        ("x" * 1200 + "y" * 1300, ["x" * 1200], 0),  # 1200 of 2500 letters
        ("x" * 1000 + "y" * 200, ["x" * 1200], 5 / 6),
        ("", ["a"], 0),
    ],
)
def test_anls_by_hand(said, answers, expected):
    assert anls(said, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "answer", "expected"),
    [
        ("105", "100", 1), ("95", "100", 1), ("105.1", "100", 0), ("94", "100", 0),
        ("-10.2", "-10", 1), ("10", "-10", 0), ("0", "0", 1), ("0.01", "0", 0),
        ("1,050", "1000", 0), ("1,000", "1,000", 1), ("$20", "20", 0), ("20.", "20", 1), ("52%", "50%", 1),
        ("0.5", "50%", 1), ("50", "50%", 0), ("50 %", "50%", 1), ("1e3", "1000", 1), ("1040", "1e3", 1),
        ("Yes", "yes", 1), ("yes.", "Yes", 0), ("the yes", "yes", 0), ("", "x", 0), ("12 a", "12", 0),
        ("0.0", "0", 0), ("0%", "0%", 1), ("5", "9" * 400, 0), ("nan", "5", 0), ("Infinity", "infinity", 1),
    ],
)  # fmt: skip
def test_relaxed_accuracy_is_that_of_pix2struct(said, answer, expected):
    assert relaxed(said, [answer]) == expected


@pytest.mark.parametrize(
    ("said", "answers", "formula", "expected"),
    [
        ("The sign says STOP\nnow", ["stop now"], False, 1), ("sto p", ["stop"], False, 0), ("B", ["A", "b"], False, 1),
        ("x ^ { 2 }", ["x^{2}"], True, 1), ("X^{2}", ["x^{2}"], True, 0), ("a", [""], False, 0),
    ],
)  # fmt: skip
def test_an_answer_stands_in_what_is_said(said, answers, formula, expected):
    assert contains(said, answers, formula) == expected
