"""Captions as samples: which objects a caption names, and which of them are not in the picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from codebook.inference.samples import Scorer


class Mentions(NamedTuple):
    """The objects of a caption: how many it names, how many of these are not shown, and how many of those shown it has.

    A name that stands twice counts twice in `said` and `false`; `found` and `shown` are objects, each counted once.
    """

    said: int
    false: int
    found: int
    shown: int

    @property
    def f1(self) -> float:
        """The harmonic mean of the share of mentions that are shown and the share of shown objects that are named."""
        if not self.said or not self.shown:
            return float(self.said == self.shown)
        right, named = 1 - self.false / self.said, self.found / self.shown
        return 2 * right * named / (right + named) if right + named else 0.0


@dataclass(frozen=True)
class CaptionScorer:
    """A scorer of captions, which also counts what they name.

    Attributes
    ----------
    count
        The mentions of a caption, given the sample's answers.
    score
        The caption's own score; default: `Mentions.f1`.
    """

    count: Callable[[str, Sequence[str]], Mentions]
    score: Scorer | None = None

    def __call__(self, prediction: str, answers: Sequence[str]) -> float:
        return self.count(prediction, answers).f1 if self.score is None else self.score(prediction, answers)


def count_mentions(named: Sequence[Hashable], shown: Sequence[Hashable]) -> Mentions:
    """The mentions of a list of named objects, in a picture that shows others or the same."""
    there = set(shown)
    false = sum(name not in there for name in named)
    return Mentions(len(named), false, len(there.intersection(named)), len(there))


IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
    "knives": "knife", "calves": "calf", "loaves": "loaf", "shelves": "shelf", "leaves": "leaf", "feet": "foot",
    "teeth": "tooth", "oxen": "ox",
}  # fmt: skip
"""Plurals that no ending tells."""


@dataclass(frozen=True)
class Vocabulary:
    """Words for objects, as a file of synonyms has them.

    Attributes
    ----------
    names
        The object behind each word or phrase, in small letters.
    """

    names: Mapping[str, str]
    _longest: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_longest", max((len(name.split()) for name in self.names), default=0))

    def named(self, text: str) -> list[str]:
        """The objects that a text names, in its order. The longest phrase counts: a hot dog is no dog.

        A word may stand in the plural, with an ending or as in `IRREGULAR`.
        """
        words, found, at = re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower()), [], 0
        while at < len(words):
            for length in range(min(self._longest, len(words) - at), 0, -1):
                if name := self._name(words[at : at + length]):
                    found.append(name)
                    at += length
                    break
            else:
                at += 1
        return found

    def _name(self, words: Sequence[str]) -> str | None:
        *before, last = words
        forms = (" ".join([*before, form]) for form in singulars(last))
        return next((self.names[form] for form in forms if form in self.names), None)

    def count(self, text: str, answers: Sequence[str]) -> Mentions:
        """The mentions of a caption about a picture that shows the objects `answers`."""
        return count_mentions(self.named(text), answers)


def singulars(word: str) -> list[str]:
    """What a word may be the plural of, itself first."""
    found = [word]
    if word in IRREGULAR:
        found.append(IRREGULAR[word])
    if word.endswith("ies"):
        found.append(word[:-3] + "y")
    if word.endswith("es"):
        found.append(word[:-2])
    if word.endswith("s") and not word.endswith("ss"):
        found.append(word[:-1])
    return found
