"""How generated answers are scored, by the rules of the data sets they belong to."""

from __future__ import annotations

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
"""Of the official evaluation, less those of two apostrophes; words such as "were" and "its" are words of their own."""


@lru_cache(maxsize=2**16)  # people agree
def normalised(text: str) -> str:
    """An answer as the official VQA evaluation compares it: no articles, punctuation, or digits in words.

    Punctuation between two characters becomes a space, unless the text has it beside a space, or a comma in a number;
    points stay in decimals (https://visualqa.org/evaluation.html).
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    commas = re.search(r"\d,\d", text) is not None
    out = text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if commas or f"{mark} " in text or f" {mark}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy: of each choice of all people but one, a third for each who agrees, at most 1; their mean.

    With ten people that is min(1, 0.3 n) of n who agree (https://visualqa.org/evaluation.html; TextVQA and VizWiz use
    the same).
    """
    said, given = normalised(prediction), [normalised(answer) for answer in answers]
    if len(given) == 1:
        return float(said == given[0])
    agree = sum(answer == said for answer in given)
    return sum(min(1.0, (agree - (answer == said)) / 3) for answer in given) / len(given)


def same(prediction: str, answers: Sequence[str]) -> float:
    """1 if one of the answers is given, case, articles and punctuation aside."""
    return float(normalised(prediction) in map(normalised, answers))


def letter(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction names the right option: its letter alone, or first, as in "B", "(B)" or "B. leaf"."""
    found = re.match(r"\W*([A-Z])(?![A-Za-z'])", prediction.strip())
    return float(found is not None and found[1] == answers[0])


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?|\.\d+", text)]


def box_overlap(prediction: str, answers: Sequence[str]) -> float:
    """1 if intersection over union with the right box is at least 0.5.

    A prediction is the first four numbers: left, top, right, bottom as fractions of the image's sides, as the answer
    is; or, where one is above 1, as thousandths of them (Qwen2-VL, Qwen3-VL and InternVL say so).
    """
    said, right = numbers(prediction)[:4], numbers(answers[0])
    if len(said) < 4:
        return 0.0
    if max(said) > 1:
        said = [x / 1000 for x in said]
    (a, b, c, d), (e, f, g, h) = said, right
    shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    union = max(0.0, c - a) * max(0.0, d - b) + (g - e) * (h - f) - shared
    return float(union > 0 and shared / union >= 0.5)
