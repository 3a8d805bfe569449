"""CIDEr-D: how much a caption has in common with what people wrote (arXiv 1411.5726)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

LONGEST = 4
"""Words of the longest n-grams."""
SIGMA = 6.0
"""Standard deviation of the penalty on a difference in length, in pairs of words."""
WORD = re.compile(r"n't\b|(?:(?!n't\b)\w)+(?:-\w+)*|'\w+")
"""Words of a caption in small letters, near those of the Penn Treebank: `don't` and `man's` are two, marks are none."""

Grams = list[Counter[tuple[str, ...]]]
"""For n = 1 to LONGEST how often a text has each n-gram."""


def grams(text: str) -> Grams:
    """The n-grams of a text."""
    words = WORD.findall(text.lower())
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, LONGEST + 1)]


@dataclass(frozen=True)
class Consensus:
    """A scorer of captions, for the pictures of a corpus: a tenth of CIDEr-D, so that 1 is the most.

    An n-gram weighs its frequency in the text times log(pictures / pictures whose captions have it). For each n the
    weights of the caption, cut down to those of a reference, are compared with the reference's by their cosine, times
    exp(-d^2 / (2 SIGMA^2)) of the difference d in length; the mean is over n and over the references. The formula is
    that of pycocoevalcap's `cider_scorer.py`, without its tokenizer in Java.

    Attributes
    ----------
    pictures
        How many the corpus has.
    having
        How many pictures have an n-gram in one of their captions.
    """

    pictures: int
    having: Counter[tuple[str, ...]]

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]]) -> Consensus:
        """The scorer for a corpus, given the captions of each picture."""
        having: Counter[tuple[str, ...]] = Counter()
        for own in captions:
            having.update({gram for text in own for counts in grams(text) for gram in counts})
        return cls(len(captions), having)

    def __call__(self, prediction: str, answers: Sequence[str]) -> float:
        said = grams(prediction)
        return sum(self._alike(said, grams(answer)) for answer in answers) / len(answers)

    def _alike(self, said: Grams, right: Grams) -> float:
        apart = said[1].total() - right[1].total()
        found = 0.0
        for own, other in zip(map(self._weights, said), map(self._weights, right), strict=True):
            shared = sum(min(own[gram], weight) * weight for gram, weight in other.items() if gram in own)
            norms = math.sqrt(sum(x * x for x in own.values()) * sum(x * x for x in other.values()))
            found += shared / norms if norms else 0.0
        return found / LONGEST * math.exp(-(apart**2) / (2 * SIGMA**2))

    def _weights(self, counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {gram: n * math.log(self.pictures / max(1, self.having[gram])) for gram, n in counts.items()}
