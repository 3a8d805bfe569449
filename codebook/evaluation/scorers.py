"""Scores of generated answers, by the rules of the data sets that they belong to."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_SHORTENED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in _SHORTENED.split()}
"""Contractions of the official evaluation without an apostrophe, and with it. Contractions of two apostrophes are left
out, and so are words in their own right, such as "were" and "its"."""


@lru_cache(maxsize=2**16)  # most people give the same few answers
def normalised(text: str) -> str:
    """An answer as the official VQA evaluation compares it: without articles and punctuation, numbers as digits.

    A punctuation mark becomes a space; it is deleted instead if the text has it beside a space, or has a comma in a
    number. Points stay in decimals (https://visualqa.org/evaluation.html). A text of nothing else stays as it is: the
    option "A" is not an empty answer.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    commas = re.search(r"\d,\d", text) is not None
    out = text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if commas or f"{mark} " in text or f" {mark}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    left = [word for word in words if word not in ARTICLES] or words or [text]
    return " ".join(CONTRACTIONS.get(word, word) for word in left)


FEWEST_PEOPLE = 4
"""Fewest people of whose answers one can score 1 by `vqa`: three beside the one who is left out."""


def vqa(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy: a third for each person who gave the answer, at most 1.

    It is averaged over leaving each person out in turn. With ten people of whom n agree that is min(1, 0.3 n)
    (https://visualqa.org/evaluation.html; TextVQA and VizWiz use the same). A single answer is right or wrong; from two
    or three people no answer could score 1, and `check_people` refuses them.
    """
    guess, given = normalised(prediction), [normalised(answer) for answer in answers]
    if len(given) == 1:
        return float(guess == given[0])
    agree = sum(answer == guess for answer in given)
    return sum(min(1.0, (agree - (answer == guess)) / 3) for answer in given) / len(given)


def check_people(answers: Sequence[str]) -> None:
    """Refuse two or three people's answers to a question, by which `vqa` cannot score.

    Raises
    ------
    ValueError
    """
    if 1 < len(answers) < FEWEST_PEOPLE:
        raise ValueError(f"by the rule vqa, which is for ten people, no answer of {len(answers)} can score 1")


def same(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, up to case, articles and punctuation."""
    return float(normalised(prediction) in map(normalised, answers))


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, up to case, white space around it and points at its end."""
    return float(prediction.lower().strip().rstrip(".") in [answer.lower().strip() for answer in answers])


def named(prediction: str, answers: Sequence[str], among: Sequence[str]) -> float:
    """1 if of the words `among`, one of which is right, the prediction has the right one and no other."""
    said = set(normalised(prediction).split())
    return float(said.intersection(among) == set(answers))


LED = re.compile(r"\W*(?:(?i:(?:the )?(?:best |correct )?(?:answer|option)(?: is)?\b)\W*)?([A-Z])(?![A-Za-z'])")
"""An option's letter, and the words that may lead up to it: those of Video-MME's own script (arXiv 2405.21075)."""


def letter(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction names the right option: its letter alone, or first, as in "(B)", "B. leaf" or "Answer: B"."""
    found = LED.match(prediction)
    return float(found is not None and found[1] == answers[0])


CORNERS = re.compile(r"(?<!\w)" + r"[^\w.]+".join([r"(\d+(?:\.\d+)?|\.\d+)"] * 4))
"""Four numbers in a row without words between them; not those in words, as in `bbox_2d` and `the 2nd`."""


def _corners(text: str) -> list[float]:
    found = CORNERS.search(text)
    return [] if found is None else [float(number) for number in found.groups()]


def box_overlap(prediction: str, answers: Sequence[str]) -> float:
    """1 if intersection over union with the right box is at least 0.5.

    The prediction's first four numbers in a row are its box: left, top, right, bottom, as fractions of the image's
    sides like the answer; or, if one of them is above 1, as thousandths (Qwen2-VL, Qwen3-VL and InternVL answer so).
    """
    box, right = _corners(prediction), _corners(answers[0])
    if not box:
        return 0.0
    if max(box) > 1:
        box = [x / 1000 for x in box]
    (a, b, c, d), (e, f, g, h) = box, right
    shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    union = max(0.0, c - a) * max(0.0, d - b) + (g - e) * (h - f) - shared
    return float(union > 0 and shared / union >= 0.5)


def edits(text: str, other: str) -> int:
    """Levenshtein's distance: fewest letters to insert, delete or replace that make one text the other."""
    row = list(range(len(other) + 1))
    for i, letter_here in enumerate(text, 1):
        above, row[0] = row[0], i
        for j, letter_there in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (letter_here != letter_there))
    return row[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalized Levenshtein similarity to the nearest answer, 0 below one half (arXiv 1905.13648, 2007.00398).

    The distance is divided by the longer text's length; case and runs of spaces do not count. DocVQA's and InfoVQA's
    rule; the mean over the questions is ANLS. One half itself counts, as in the script of the data sets' own site.
    """
    guess = _folded(prediction)
    return max(_similarity(guess, _folded(answer)) for answer in answers)


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(text: str, other: str) -> float:
    shorter, longer = sorted((len(text), len(other)))
    if 2 * shorter < longer:  # the distance is the difference in length at least: no need to take its steps
        return 0.0
    found = 1 - edits(text, other) / longer if longer else 1.0
    return found if found >= 0.5 else 0.0


def relaxed(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is a number within 5% of the answer's, or where one of them is none the same text (ChartQA).

    The rule is that of pix2struct's `relaxed_correctness`, by which models are compared: a number is what Python's
    `float` reads, such as `1e3`, and not `1,000` or `$20`; percent signs at its end divide by a hundred; an answer of 0
    is compared as a text, and texts whatever their case (arXiv 2203.10244). Infinity and nan are texts here.
    """
    return float(any(_is_near(prediction, answer) for answer in answers))


def _is_near(prediction: str, answer: str) -> bool:
    guess, right = _number(prediction), _number(answer)
    if guess is None or not right:
        return prediction.strip().lower() == answer.strip().lower()
    return abs(guess - right) / abs(right) <= 0.05


def _number(text: str) -> float | None:
    digits = text.strip()
    try:
        value = float(digits.rstrip("%")) / (100 if digits.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def contains(prediction: str, answers: Sequence[str], formula: bool = False) -> float:
    """1 if one of the answers stands in the prediction: OCRBench's rule (arXiv 2305.07895).

    Case and line ends do not count; in a `formula` case does, and no white space at all.
    """

    def flat(text: str) -> str:
        return "".join(text.split()) if formula else text.lower().strip().replace("\n", " ")

    return float(any(flat(answer) and flat(answer) in flat(prediction) for answer in answers))
