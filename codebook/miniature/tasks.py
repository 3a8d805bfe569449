"""The questions asked about scenes, albums and films, their answers, and the visual tokens each answer needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from codebook.errors import unknown
from codebook.miniature.scenes import (
    COLOR_NAMES,
    GRID,
    IMAGE_SIDE,
    MOVES,
    SHAPES,
    Film,
    Number,
    Scene,
    Thing,
    album,
    film,
    scene,
)

COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CELLS = 4  # localization names a cell of a 4 x 4 board: a1 (top left) .. d4
BINS = 24  # box edges are named by bins of 4 pixels: p0 .. p23
SIDES = ("left", "right", "above", "below")
RATHER = 8  # pixels by which one axis must exceed the other before "left" beats "above"
PLACES = COUNTS[1:9]  # images of an album and frames of a film are counted from one


@dataclass(frozen=True)
class Question:
    """One question about one or more images.

    Attributes
    ----------
    images : pictures, 96 x 96 RGB: one, an album's two or three, or a film's four to eight frames
    question, answer : plain text, without the chat template
    family : one of TASK_FAMILIES
    patches : for each image the visual tokens that the answer needs, raster order in the 12 x 12 grid; empty where
        the answer rests on something being absent
    """

    images: tuple[Image.Image, ...] = field(repr=False)
    question: str
    answer: str
    family: str
    patches: tuple[list[int], ...] = field(repr=False)


Parts = tuple[str, str, tuple[list[int], ...]]  # question, answer, patches of each image


def _pick(rng: np.random.Generator, options: list | tuple):
    return options[int(rng.integers(len(options)))]


def _patches(*items: Thing | Number) -> list[int]:
    return sorted({place for item in items for place in item.patches})


def _one(question: str, answer: str, *items: Thing | Number) -> Parts:
    return question, answer, (_patches(*items),)


def _names(picture: Scene, thing: Thing) -> list[str]:
    """The descriptions that fit this object and no other one."""
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
    """What can be pointed at without doubt, in random order, each by one of its descriptions."""
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
    return _one(f"is there a {what}?", "yes" if yes else "no", *proof)


def _attr(picture: Scene, rng: np.random.Generator) -> Parts | None:
    kind = int(rng.integers(100))
    for name, thing in _referents(picture, rng, number=False):
        assert isinstance(thing, Thing)
        if kind < 10:
            return _one(f"what size is the {name}?", thing.size, thing)
        known = "shape" if kind < 55 else "color"
        wanted = "color" if known == "shape" else "shape"
        value = getattr(thing, known)
        if sum(getattr(other, known) == value for other in picture.things) == 1:
            name = value if known == "shape" else f"{value} object"
            return _one(f"what {wanted} is the {name}?", getattr(thing, wanted), thing)
    return None


def _count(picture: Scene, rng: np.random.Generator) -> Parts | None:
    kind = int(rng.integers(100))
    if kind < 34:
        return _one("how many objects are there?", COUNTS[len(picture.things)], *picture.things)
    key, names = ("color", COLOR_NAMES) if kind < 67 else ("shape", SHAPES)
    # Ask mostly about what is there, or "zero" would be the answer most of the time.
    there = rng.integers(100) < 80
    value = getattr(_pick(rng, picture.things), key) if there else _pick(rng, names)
    found = [t for t in picture.things if getattr(t, key) == value]
    what = value if key == "color" else f"a {value}"
    return _one(f"how many objects are {what}?", COUNTS[len(found)], *found)


def _loc(picture: Scene, rng: np.random.Generator) -> Parts | None:
    cell = IMAGE_SIDE // CELLS
    for name, item in _referents(picture, rng, number=True):
        x, y = _centre(item)
        # A centre on the border of two cells has no right answer.
        if all(2 <= z % cell < cell - 2 for z in (x, y)):
            return _one(f"where is the {name}?", f"{'abcd'[y // cell]}{x // cell + 1}", item)
    return None


def _box(picture: Scene, rng: np.random.Generator) -> Parts | None:
    for name, item in _referents(picture, rng, number=True):
        left, top, right, bottom = item.box
        size = IMAGE_SIDE // BINS
        bins = (left // size, top // size, (right - 1) // size, (bottom - 1) // size)
        return _one(f"locate the {name}.", " ".join(f"p{b}" for b in bins), item)
    return None


def _ocr(picture: Scene, rng: np.random.Generator) -> Parts | None:
    if picture.number is None:
        return None
    return _one("read the number.", " ".join(picture.number.digits), picture.number)


def _rel(picture: Scene, rng: np.random.Generator) -> Parts | None:
    found = _referents(picture, rng, number=True)
    for (name, item), (other_name, other) in pairwise(found):
        (x, y), (u, v) = _centre(item), _centre(other)
        dx, dy = x - u, y - v
        if abs(abs(dx) - abs(dy)) >= RATHER:
            far, near = ("right", "left") if abs(dx) > abs(dy) else ("below", "above")
            side = far if (dx if abs(dx) > abs(dy) else dy) > 0 else near
            return _one(f"where is the {name} relative to the {other_name}?", side, item, other)
    return None


def _word(picture: Scene, rng: np.random.Generator) -> Parts | None:
    """One word for the picture: the shape of its largest objects, where they agree on one."""
    size = "big" if any(t.size == "big" for t in picture.things) else "small"
    main = [t for t in picture.things if t.size == size]
    if len({t.shape for t in main}) != 1:
        return None
    return _one("describe in one word.", main[0].shape, *main)


def _cap(picture: Scene, rng: np.random.Generator) -> Parts | None:
    """Caption: every object in the fixed order of the colours, then whether there is a number."""
    order = sorted(picture.things, key=lambda t: (COLOR_NAMES.index(t.color), SHAPES.index(t.shape)))
    names = [f"{t.color} {t.shape}" for t in order] + ["number"] * len(picture.numbers)
    return _one("describe.", ", ".join(names), *picture.things, *picture.numbers)


def _multi(scenes: tuple[Scene, ...], rng: np.random.Generator) -> Parts | None:
    """Which image holds something that one image alone holds, or whether a shape has one colour in both."""
    alone = [{t.shape: t for t in s.things if sum(o.shape == t.shape for o in s.things) == 1} for s in scenes]
    both = [shape for shape in SHAPES if all(shape in own for own in alone)]
    if len(scenes) == 2 and both and rng.integers(100) < 80:
        same = bool(rng.integers(2))
        fit = [shape for shape in both if (alone[0][shape].color == alone[1][shape].color) == same]
        shape = _pick(rng, fit or both)
        one, two = (own[shape] for own in alone)
        answer = "same" if one.color == two.color else "different"
        return f"is the color of the {shape} the same or different?", answer, (one.patches, two.patches)
    kind = int(rng.integers(100))
    names = [
        {(t.color if kind < 80 else "", t.shape if kind < 60 or kind >= 80 else "") for t in s.things} for s in scenes
    ]
    held = [(i, name) for i, own in enumerate(names) for name in sorted(own) if sum(name in o for o in names) == 1]
    if not held:
        return None
    i, (color, shape) = _pick(rng, held)
    proof = [t for t in scenes[i].things if color in (t.color, "") and shape in (t.shape, "")]
    patches = tuple(_patches(*proof) if i == j else [] for j in range(len(scenes)))
    return f"which image has a {' '.join(filter(None, (color, shape or 'object')))}?", PLACES[i], patches


def _video(shot: Film, rng: np.random.Generator) -> Parts | None:
    """Which way something moved, what moved, what appeared; and whether this or that did."""
    last, kind = shot.frames[-1], int(rng.integers(100))
    movers = tuple(frame.things[0].patches for frame in shot.frames)
    new = shot.newcomer
    shown = tuple(new.patches if new in frame.things else [] for frame in shot.frames)
    if kind < 20:
        return "what moved?", f"{shot.mover.color} {shot.mover.shape}", movers
    if kind < 40:
        return "what appeared?", f"{new.color} {new.shape}", shown
    if kind < 80:
        names = _names(last, last.things[0])
        return (f"which way did the {_pick(rng, names)} move?", shot.move, movers) if names else None
    verb, actor = ("move", last.things[0]) if kind < 90 else ("appear", new)
    yes = bool(rng.integers(2))
    thing = actor if yes else _pick(rng, [t for t in last.things if t != actor])
    still = tuple(thing.patches for _ in shot.frames)
    proof = movers if thing is last.things[0] else shown if thing is new else still
    names = _names(last, thing)
    return (f"did the {_pick(rng, names)} {verb}?", "yes" if yes else "no", proof) if names else None


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


@dataclass(frozen=True)
class TaskFamily:
    """A kind of question: what it is drawn about (a scene, an album, a film), how it is asked and how it is scored."""

    draw: Callable[..., Any]
    ask: Callable[[Any, np.random.Generator], Parts | None]
    score: Callable[[str, str], float] = _exact


TASK_TABLE = {
    "exist": TaskFamily(scene, _exist),
    "attr": TaskFamily(scene, _attr),
    "count": TaskFamily(scene, _count),
    "loc": TaskFamily(scene, _loc),
    "box": TaskFamily(scene, _box, _overlap),
    "ocr": TaskFamily(scene, _ocr),
    "rel": TaskFamily(scene, _rel),
    "word": TaskFamily(scene, _word),
    "cap": TaskFamily(scene, _cap, _phrases),
    "multi": TaskFamily(album, _multi),
    "video": TaskFamily(film, _video),
}
TASK_FAMILIES = tuple(TASK_TABLE)
SCENE_FAMILIES = tuple(name for name, family in TASK_TABLE.items() if family.draw is scene)
"""Families of questions about one scene."""


def make_question(shown: Any, family: str, rng: np.random.Generator) -> Parts | None:
    """One question of a family about a scene, an album or a film, or None if the picture does not allow one.

    Returns
    -------
    question, answer, and for each image the indices of the patches that the answer needs
    """
    return TASK_TABLE[_require_family(family)].ask(shown, rng)


def scenes_shown(shown: Scene | tuple[Scene, ...] | Film) -> tuple[Scene, ...]:
    """The images of a scene, an album or a film."""
    if isinstance(shown, Scene):
        return (shown,)
    return shown.frames if isinstance(shown, Film) else shown


def tasks(
    family: str, split: str = "test", seed: int = 0, count: int = 200, *, look: str = "plain"
) -> Iterator[Question]:
    """Questions of one family, `count` of them, each about a scene, an album or a film of its own.

    Parameters
    ----------
    family : one of TASK_FAMILIES
    split : "test" is disjoint from what the miniature was trained on
    seed : same seed, same questions, on every machine
    look : one of `codebook.miniature.scenes.LOOKS`
    """
    draw = TASK_TABLE[_require_family(family)].draw
    index = found = 0
    while found < count:
        # Streams of seed 0.. with a leading 1 are for questions; training leads with 0.
        shown = draw(split, 1, seed, index, look=look)
        rng = np.random.Generator(np.random.PCG64([TASK_FAMILIES.index(family), seed, index]))
        parts = make_question(shown, family, rng)
        index += 1
        if parts is not None:
            found += 1
            images = tuple(Image.fromarray(picture.pixels) for picture in scenes_shown(shown))
            yield Question(images, parts[0], parts[1], family, parts[2])


def score(family: str, prediction: str, answer: str) -> float:
    """The score of a prediction, in [0, 1].

    Exact words, except box (1 if the intersection over union is at least 0.5) and cap (F1 over the
    comma-separated phrases, in any order).
    """
    return TASK_TABLE[_require_family(family)].score(prediction, answer)


def _require_family(family: str) -> str:
    if family not in TASK_TABLE:
        raise unknown("no task family", family, TASK_TABLE)
    return family


def vocabulary() -> list[str]:
    """Every word that the questions and answers are made of."""
    text = (
        "is there a an the what which where who how many are do does did in one word of to relative same or different "
        "describe read locate find object objects number color shape size small big yes no image images picture frame "
        "has way move moved appear appeared first last"
    )
    words = [*text.split(), *COLOR_NAMES, *SHAPES, *COUNTS, *SIDES, *MOVES]
    words += [str(d) for d in range(10)] + [f"{r}{c + 1}" for r in "abcd" for c in range(CELLS)]
    words += [f"p{b}" for b in range(BINS)] + ["?", ".", ",", ":", "!"]
    return list(dict.fromkeys(words))


assert GRID * GRID == 144  # the patches of a Question index this grid
