"""The questions that are asked about a scene, their answers, and the visual tokens each answer needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from PIL import Image

from codebook.errors import CodebookError
from codebook.miniature.scenes import (
    COLOR_NAMES,
    GRID,
    SHAPES,
    SIDE,
    Number,
    Scene,
    Thing,
    scene,
)

COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CELLS = 4  # localization names a cell of a 4 x 4 board: a1 (top left) .. d4
BINS = 24  # box edges are named by bins of 4 pixels: p0 .. p23
SIDES = ("left", "right", "above", "below")
RATHER = 8  # pixels by which one axis must win before "left" beats "above"


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes
    ----------
    image : the picture, 96 x 96 RGB
    question, answer : plain text, without the chat template
    family : one of FAMILIES
    patches : the visual tokens that the answer needs, raster order in the 12 x 12 grid; empty where
        the answer rests on something being absent
    """

    image: Image.Image = field(repr=False)
    question: str
    answer: str
    family: str
    patches: list[int] = field(repr=False)


Parts = tuple[str, str, list[int]]  # question, answer, patches
Asker = Callable[[Scene, np.random.Generator], Parts | None]


def _pick(rng: np.random.Generator, options: list | tuple):
    return options[int(rng.integers(len(options)))]


def _patches(*items: Thing | Number) -> list[int]:
    return sorted({place for item in items for place in item.patches})


def _names(picture: Scene, thing: Thing) -> list[str]:
    """Return the descriptions that fit this object and no other one."""
    options = {
        f"{thing.color} {thing.shape}": ("color", "shape"),
        thing.shape: ("shape",),
        f"{thing.color} object": ("color",),
    }
    return [
        name
        for name, keys in options.items()
        if sum(all(getattr(o, k) == getattr(thing, k) for k in keys) for o in picture.things) == 1
    ]


def _referents(picture: Scene, rng: np.random.Generator, *, number: bool) -> list[tuple[str, Thing | Number]]:
    """Return what can be pointed at without doubt, in random order, each by one of its descriptions."""
    found: list[tuple[str, Thing | Number]] = []
    for thing in picture.things:
        names = _names(picture, thing)
        if names:
            found.append((_pick(rng, names), thing))
    if number and picture.number:
        found.append(("number", picture.number))
    return [found[i] for i in rng.permutation(len(found))]


def _exist(picture: Scene, rng: np.random.Generator) -> Parts | None:
    yes, kind = bool(rng.integers(2)), int(rng.integers(100))
    pairs = {(t.color, t.shape) for t in picture.things}
    colors, shapes = sorted({c for c, _ in pairs}), sorted({s for _, s in pairs})
    if kind < 76:
        # Hard negatives: the colour is there, the shape is there, but not on one object.
        crossed = [(c, s) for c in colors for s in shapes if (c, s) not in pairs]
        if yes:
            color, shape = _pick(rng, sorted(pairs))
        elif crossed and rng.integers(100) < 75:
            color, shape = _pick(rng, crossed)
        else:
            absent = [(c, s) for c in COLOR_NAMES for s in SHAPES if (c, s) not in pairs]
            color, shape = _pick(rng, absent)
        what = f"{color} {shape}"
    elif kind < 88:
        shape, color = _pick(rng, shapes if yes else [s for s in SHAPES if s not in shapes] or [None]), None
        what = shape
    else:
        color, shape = _pick(rng, colors if yes else [c for c in COLOR_NAMES if c not in colors]), None
        what = f"{color} object"
    if what is None:
        return None
    # For a "no", what could be mistaken for it is the evidence: nothing else carries the answer.
    if yes:
        proof = [t for t in picture.things if color in (t.color, None) and shape in (t.shape, None)]
    else:
        proof = [t for t in picture.things if t.color == color or t.shape == shape]
    return f"is there a {what}?", "yes" if yes else "no", _patches(*proof)


def _attr(picture: Scene, rng: np.random.Generator) -> Parts | None:
    kind = int(rng.integers(100))
    for name, thing in _referents(picture, rng, number=False):
        assert isinstance(thing, Thing)
        if kind < 10:
            return f"what size is the {name}?", thing.size, thing.patches
        known = "shape" if kind < 55 else "color"
        wanted = "color" if known == "shape" else "shape"
        value = getattr(thing, known)
        if sum(getattr(other, known) == value for other in picture.things) == 1:
            name = value if known == "shape" else f"{value} object"
            return f"what {wanted} is the {name}?", getattr(thing, wanted), thing.patches
    return None


def _count(picture: Scene, rng: np.random.Generator) -> Parts | None:
    kind = int(rng.integers(100))
    if kind < 34:
        return "how many objects are there?", COUNTS[len(picture.things)], _patches(*picture.things)
    key, names = ("color", COLOR_NAMES) if kind < 67 else ("shape", SHAPES)
    # Ask mostly about what is there, or "zero" would be the answer most of the time.
    there = rng.integers(100) < 80
    value = getattr(_pick(rng, picture.things), key) if there else _pick(rng, names)
    found = [t for t in picture.things if getattr(t, key) == value]
    what = value if key == "color" else f"a {value}"
    return f"how many objects are {what}?", COUNTS[len(found)], _patches(*found)


def _loc(picture: Scene, rng: np.random.Generator) -> Parts | None:
    cell = SIDE // CELLS
    for name, item in _referents(picture, rng, number=True):
        x, y = _centre(item)
        # A centre on the border of two cells has no right answer.
        if all(2 <= z % cell < cell - 2 for z in (x, y)):
            return f"where is the {name}?", f"{'abcd'[y // cell]}{x // cell + 1}", item.patches
    return None


def _box(picture: Scene, rng: np.random.Generator) -> Parts | None:
    for name, item in _referents(picture, rng, number=True):
        left, top, right, bottom = item.box
        size = SIDE // BINS
        bins = (left // size, top // size, (right - 1) // size, (bottom - 1) // size)
        return f"locate the {name}.", " ".join(f"p{b}" for b in bins), item.patches
    return None


def _ocr(picture: Scene, rng: np.random.Generator) -> Parts | None:
    if picture.number is None:
        return None
    return "read the number.", " ".join(picture.number.digits), picture.number.patches


def _rel(picture: Scene, rng: np.random.Generator) -> Parts | None:
    found = _referents(picture, rng, number=True)
    for (name, item), (other_name, other) in pairwise(found):
        (x, y), (u, v) = _centre(item), _centre(other)
        dx, dy = x - u, y - v
        if abs(abs(dx) - abs(dy)) >= RATHER:
            far, near = ("right", "left") if abs(dx) > abs(dy) else ("below", "above")
            side = far if (dx if abs(dx) > abs(dy) else dy) > 0 else near
            return f"where is the {name} relative to the {other_name}?", side, _patches(item, other)
    return None


def _word(picture: Scene, rng: np.random.Generator) -> Parts | None:
    """One word for the picture: the shape of its largest objects, where they agree on one."""
    size = "big" if any(t.size == "big" for t in picture.things) else "small"
    main = [t for t in picture.things if t.size == size]
    if len({t.shape for t in main}) != 1:
        return None
    return "describe in one word.", main[0].shape, _patches(*main)


def _cap(picture: Scene, rng: np.random.Generator) -> Parts | None:
    """Caption: every object in the fixed order of the colours, then whether there is a number."""
    order = sorted(picture.things, key=lambda t: (COLOR_NAMES.index(t.color), SHAPES.index(t.shape)))
    names = [f"{t.color} {t.shape}" for t in order] + ["number"] * len(picture.numbers)
    return "describe.", ", ".join(names), _patches(*picture.things, *picture.numbers)


def _centre(item: Thing | Number) -> tuple[int, int]:
    left, top, right, bottom = item.box
    return (left + right) // 2, (top + bottom) // 2


def _exact(prediction: str, answer: str) -> float:
    return float(_words(prediction) == _words(answer))


def _overlap(prediction: str, answer: str) -> float:
    """1 where the boxes overlap by at least half of their union."""
    boxes = []
    for text in (prediction, answer):
        bins = re.findall(r"\bp(\d+)\b", text)
        if len(bins) != 4:
            return 0.0
        left, top, right, bottom = map(int, bins)
        boxes.append((left, top, right + 1, bottom + 1))
    (a, b, c, d), (e, f, g, h) = boxes
    shared = max(0, min(c, g) - max(a, e)) * max(0, min(d, h) - max(b, f))
    union = max(0, c - a) * max(0, d - b) + (g - e) * (h - f) - shared
    return float(2 * shared >= union)


def _phrases(prediction: str, answer: str) -> float:
    """F1 between the two lists of phrases, whatever their order."""
    said, wanted = ([_words(p) for p in text.split(",") if _words(p)] for text in (prediction, answer))
    shared = 0
    left = list(wanted)
    for phrase in said:
        if phrase in left:
            left.remove(phrase)
            shared += 1
    return 2 * shared / (len(said) + len(wanted)) if said or wanted else 1.0


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


# One row a family: how to ask, how to score.
TABLE: dict[str, tuple[Asker, Callable[[str, str], float]]] = {
    "exist": (_exist, _exact),
    "attr": (_attr, _exact),
    "count": (_count, _exact),
    "loc": (_loc, _exact),
    "box": (_box, _overlap),
    "ocr": (_ocr, _exact),
    "rel": (_rel, _exact),
    "word": (_word, _exact),
    "cap": (_cap, _phrases),
}
FAMILIES = tuple(TABLE)


def ask(picture: Scene, family: str, rng: np.random.Generator) -> Parts | None:
    """Ask one question of a family about a scene, or None where the scene does not allow one.

    Returns
    -------
    question, answer, and the indices of the patches that the answer needs
    """
    return TABLE[_known(family)][0](picture, rng)


def tasks(family: str, split: str = "test", seed: int = 0, count: int = 200) -> Iterator[Question]:
    """Yield `count` questions of one family, each about a scene of its own.

    Parameters
    ----------
    family : one of FAMILIES
    split : "test" is disjoint from what the miniature was trained on
    seed : same seed, same questions, on every machine
    """
    _known(family)
    index = found = 0
    while found < count:
        # Streams of seed 0.. with a leading 1 are for questions; training leads with 0.
        picture = scene(split, 1, seed, index)
        rng = np.random.Generator(np.random.PCG64([FAMILIES.index(family), seed, index]))
        parts = ask(picture, family, rng)
        index += 1
        if parts is not None:
            found += 1
            yield Question(Image.fromarray(picture.pixels), parts[0], parts[1], family, parts[2])


def score(family: str, prediction: str, answer: str) -> float:
    """Score a prediction in [0, 1].

    Exact words, except box (1 if the intersection over union is at least 0.5) and cap (F1 over the
    comma-separated phrases, in any order).
    """
    return TABLE[_known(family)][1](prediction, answer)


def _known(family: str) -> str:
    if family not in TABLE:
        raise CodebookError(f"unknown task family {family!r}: choose one of {', '.join(TABLE)}")
    return family


def vocabulary() -> list[str]:
    """Every word of the questions and answers, and some that later families will need."""
    grammar = "is there a an the what which where who how many are do does in one word of to relative"
    asked = "describe read locate find object objects number color shape size small big yes no"
    later = (
        "first second third last image images picture left right above below up down appeared moved same "
        "different frame frames video both only between and or not it that this has more less than other "
        "before after still gone new nothing background empty top bottom middle center row column letter "
        "text says say write list every all any none between inside outside near far next answer question "
        "i you can see with on at as by for from was were will did change changed turn most least"
    )
    words = [*grammar.split(), *asked.split(), *COLOR_NAMES, *SHAPES, *COUNTS, *SIDES]
    words += [f"{s}s" for s in SHAPES[:4]] + ["crosses", "rings", "gradient", "noise", "stripe", "check"]
    words += [str(d) for d in range(10)] + [f"{r}{c + 1}" for r in "abcd" for c in range(CELLS)]
    words += [f"p{b}" for b in range(BINS)] + ["?", ".", ",", ":", "!", *later.split()]
    return list(dict.fromkeys(words))


assert GRID * GRID == 144  # the patches of a Question index this grid
