"""Scorers by worked examples of the data sets' own definitions."""

import pytest

from codebook.evaluation.scorers import box_overlap, letter, named, normalised, same, vqa


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
    ],
)
def test_answers_are_compared_as_the_official_vqa_evaluation_does(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_of_ten_people(agree, expected):
    """With leave-one-out: of n who agree each has n - 1 others and the 10 - n have n, a third each, at most 1."""
    answers = ["two"] * agree + [f"other {i}" for i in range(10 - agree)]
    assert vqa("2.", answers) == pytest.approx(expected)


def test_one_answer_is_right_or_wrong():
    assert vqa("a dog", ["dog"]) == 1 and vqa("cat", ["dog"]) == 0


def test_same():
    assert same("Yes.", ["yes"]) == 1 and same("yes, it is", ["yes"]) == 0 and same("", ["yes"]) == 0


@pytest.mark.parametrize(
    ("said", "expected"),
    [("red", 1), ("It is Red.", 1), ("red circle", 1), ("red and blue", 0), ("blue", 0), ("reddish", 0), ("", 0)],
)
def test_the_one_word_named_of_a_few(said, expected):
    assert named(said, ["red"], ("red", "blue")) == expected


@pytest.mark.parametrize("said", ["B", "B.", "(B)", "B. leaf", " B) leaf", "B: it is B"])
def test_the_letter_of_an_option(said):
    assert letter(said, ["B"]) == 1 and letter(said, ["A"]) == 0


@pytest.mark.parametrize("said", ["leaf", "Because", "b", "", "A B"])
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
    ],
)
def test_boxes_overlap_by_half_of_their_union(said, expected):
    assert box_overlap(said, RIGHT) == expected
