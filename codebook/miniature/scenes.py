"""Procedural scenes: coloured shapes and handwritten numbers on a textured background.

Everything is integer arithmetic over ``numpy.random.Generator(PCG64)``, so that a scene is the same
bytes on every machine: a measurement on seed 7 can be repeated anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from codebook.errors import CodebookError

SIDE = 96  # pixels
PATCH = 8
GRID = SIDE // PATCH  # 12 x 12 visual tokens
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLORS = {
    "red": (215, 40, 45),
    "green": (40, 165, 60),
    "blue": (45, 75, 220),
    "yellow": (235, 215, 50),
    "purple": (145, 50, 185),
    "orange": (240, 135, 30),
    "cyan": (65, 215, 225),
    "black": (18, 18, 18),
}
COLOR_NAMES = tuple(COLORS)
SIZES = {"small": 10, "big": 16}  # pixels
BACKGROUNDS = ("gradient", "noise", "stripe", "check")
DIGIT = 16  # pixels: the 8 x 8 handwritten digits, doubled
TRAIN_DIGITS = 1300  # the first images of the data set; the rest are seen in the test split only
SPLITS = {"train": 1, "test": 2}
# The test split has stripes and checks of widths that training never shows.
PERIODS = {"train": (5, 6, 8, 9, 12, 14), "test": (7, 10, 11)}
INK = 6  # pixels of an object in a patch, from which on the patch counts as showing it


@dataclass(frozen=True)
class Thing:
    """One object: its names, and its box in pixels (``left``, ``top``, ``side``)."""

    shape: str
    color: str
    size: str
    left: int
    top: int

    @property
    def side(self) -> int:
        return SIZES[self.size]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels, the last two exclusive."""
        return self.left, self.top, self.left + self.side, self.top + self.side

    @property
    def patches(self) -> list[int]:
        """Visual tokens that show it, raster order in the 12 x 12 grid."""
        return np.flatnonzero(_ink(self) >= INK).tolist()


@dataclass(frozen=True)
class Number:
    """A handwritten number: its digits, which images draw them, and its corner in pixels."""

    digits: str
    images: tuple[int, ...]
    left: int
    top: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels, the last two exclusive."""
        return self.left, self.top, self.left + DIGIT * len(self.digits), self.top + DIGIT

    @property
    def patches(self) -> list[int]:
        """Visual tokens that show it, raster order in the 12 x 12 grid."""
        left, top, right, bottom = (edge // PATCH for edge in self.box)
        return [row * GRID + col for row in range(top, bottom) for col in range(left, right)]


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and what is in it.

    Attributes
    ----------
    pixels : ndarray of uint8, shape (96, 96, 3)
    things : the objects
    numbers : none or one in an ordinary scene, up to three in a dense one
    """

    pixels: np.ndarray
    things: tuple[Thing, ...]
    numbers: tuple[Number, ...]
    background: str

    @property
    def number(self) -> Number | None:
        return self.numbers[0] if self.numbers else None


def scene(split: str, *seed: int, dense: bool = False) -> Scene:
    """Draw the scene of a seed.

    Parameters
    ----------
    split : "train" or "test"; they share no seed stream, no digit image and no stripe width
    seed : one or more non-negative integers
    dense : 5 to 14 objects and up to three numbers, for teaching the vision tower
    """
    if split not in SPLITS:
        raise CodebookError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    rng = np.random.Generator(np.random.PCG64([SPLITS[split], int(dense), *seed]))
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    pixels = _background(background, PERIODS[split], rng)
    taken: list[tuple[int, int, int, int]] = []
    numbers = []
    for _ in range(int(rng.integers(4)) if dense else int(rng.integers(100) < 70)):
        number = _place_number(split, taken, rng)
        if number is not None:
            numbers.append(number)
            taken.append(number.box)
    things = []
    palette, shapes = _palette(rng)
    for _ in range(int(rng.integers(5, 15) if dense else rng.integers(1, 7))):
        thing = _place_thing(palette, shapes, taken, rng)
        if thing is not None:
            things.append(thing)
            taken.append(thing.box)
    for number in numbers:
        _draw_number(pixels, number)
    for thing in things:
        jitter = rng.integers(-14, 15, size=3)
        color = np.clip(np.array(COLORS[thing.color]) + jitter, 0, 255)
        left, top, right, bottom = thing.box
        pixels[top:bottom, left:right][_mask(thing.shape, thing.side)] = color
    return Scene(pixels.astype(np.uint8), tuple(things), tuple(numbers), background)


def labels(picture: Scene) -> dict[str, np.ndarray]:
    """Say what each patch shows, for the losses that teach the vision tower.

    Returns
    -------
    dict of int64 arrays of shape (144,), -1 where there is nothing: ``shape`` (index into SHAPES),
    ``color`` (index into COLORS), ``digit``; and ``box``, float32 (144, 4): the distances from the
    patch's centre to the left, top, right, bottom of what it shows, in sides of the image.
    """
    out = {name: np.full(GRID * GRID, -1) for name in ("shape", "color", "digit")}
    box = np.zeros((GRID * GRID, 4), np.float32)
    most = np.full(GRID * GRID, INK - 1)
    index = np.arange(GRID * GRID)
    centre = np.stack([index % GRID, index // GRID] * 2, 1) * PATCH + PATCH // 2
    for thing in picture.things:
        ink = _ink(thing)
        mine = ink > most
        most = np.where(mine, ink, most)
        out["shape"][mine] = SHAPES.index(thing.shape)
        out["color"][mine] = COLOR_NAMES.index(thing.color)
        box[mine] = (np.array(thing.box) - centre[mine]) / SIDE
    for number in picture.numbers:
        box[number.patches] = (np.array(number.box) - centre[number.patches]) / SIDE
        for place in number.patches:
            column = (place % GRID * PATCH - number.left) // DIGIT
            out["digit"][place] = int(number.digits[column])
    return {**out, "box": box}


def _palette(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Half of the scenes repeat few colours and shapes, so that names must be bound to objects."""
    colors = [COLOR_NAMES[i] for i in rng.permutation(len(COLORS))]
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
    few = int(rng.integers(100)) < 50
    return (colors[: rng.integers(2, 4)], shapes[: rng.integers(2, 4)]) if few else (colors, shapes)


def _free(box: tuple[int, int, int, int], taken: list[tuple[int, int, int, int]]) -> bool:
    left, top, right, bottom = box
    return all(right < a or c < left or bottom < b or d < top for a, b, c, d in taken)


def _place_thing(
    palette: list[str], shapes: list[str], taken: list[tuple[int, int, int, int]], rng: np.random.Generator
) -> Thing | None:
    color, shape = palette[rng.integers(len(palette))], shapes[rng.integers(len(shapes))]
    size = "big" if rng.integers(100) < 40 else "small"
    for left, top in rng.integers(1, SIDE - SIZES[size], size=(24, 2)).tolist():
        thing = Thing(shape, color, size, left, top)
        if _free(thing.box, taken):
            return thing
    return None


def _place_number(split: str, taken: list[tuple[int, int, int, int]], rng: np.random.Generator) -> Number | None:
    values = digits()[1]
    first, last = (0, TRAIN_DIGITS) if split == "train" else (TRAIN_DIGITS, len(values))
    images = tuple(rng.integers(first, last, size=rng.integers(1, 4)).tolist())
    text = "".join(str(values[i]) for i in images)
    # On the patch grid: a digit is 2 x 2 visual tokens.
    columns = GRID - 2 * len(images) + 1
    for left, top in zip(rng.integers(columns, size=8).tolist(), rng.integers(GRID - 1, size=8), strict=True):
        number = Number(text, images, left * PATCH, int(top) * PATCH)
        if _free(number.box, taken):
            return number
    return None


def _draw_number(pixels: np.ndarray, number: Number) -> None:
    images = digits()[0]
    for place, index in enumerate(number.images):
        ink = images[index].astype(np.int64).repeat(2, 0).repeat(2, 1)[..., None]
        left = number.left + place * DIGIT
        under = pixels[number.top : number.top + DIGIT, left : left + DIGIT]
        under[...] = (under * (16 - ink) + 250 * ink) // 16


@cache
def _plane() -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.indices((SIDE, SIDE))
    return columns, rows


def _background(kind: str, periods: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Muted tones, so that neither the saturated objects nor the white digits vanish in it."""
    x, y = _plane()
    tones = rng.integers(70, 146, size=(2, 1)) + rng.integers(-18, 19, size=(2, 3))
    dx, dy = rng.integers(-3, 4, size=2).tolist()
    dx, dy = (1, 0) if dx == dy == 0 else (dx, dy)
    period = periods[rng.integers(len(periods))]
    if kind == "gradient":
        slope = x * dx + y * dy
        slope = (slope - slope.min()) * 255 // (slope.max() - slope.min())
        pixels = (tones[0] * (255 - slope[..., None]) + tones[1] * slope[..., None]) // 255
    elif kind == "noise":
        cell = (1, 2, 4)[rng.integers(3)]
        small = rng.integers(-28, 29, size=(SIDE // cell, SIDE // cell, 1))
        pixels = tones[0] + small.repeat(cell, 0).repeat(cell, 1)
    else:
        scale = max(abs(dx), abs(dy))
        dark = (x * dx + y * dy) // (period * scale) if kind == "stripe" else x // period + y // period
        pixels = tones[dark % 2]
    return np.clip(pixels + rng.integers(-5, 6, size=(SIDE, SIDE, 1)), 0, 255)


@cache
def _mask(shape: str, side: int) -> np.ndarray:
    """Pixels of a shape, boolean (side, side), in doubled coordinates to stay with integers."""
    grid = 2 * np.indices((side, side)) + 1
    y, x = grid[0], grid[1]
    u, v = abs(x - side), abs(y - side)
    far = u * u + v * v
    drawn = {
        "circle": far <= side * side,
        "square": np.ones((side, side), bool),
        "triangle": 2 * u <= y + 1,
        "diamond": u + v <= side,
        "cross": np.minimum(u, v) * 10 <= side * 3,
        "ring": (far <= side * side) & (far * 100 >= side * side * 30),
    }
    return drawn[shape]


def _ink(thing: Thing) -> np.ndarray:
    """Pixels of the object in every patch, int (144,)."""
    canvas = np.zeros((SIDE, SIDE), np.int64)
    left, top, right, bottom = thing.box
    canvas[top:bottom, left:right] = _mask(thing.shape, thing.side)
    return canvas.reshape(GRID, PATCH, GRID, PATCH).sum((1, 3)).ravel()


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits, shipped with the package: uint8 (1797, 8, 8) in 0..16, and their values."""
    with np.load(Path(__file__).parent / "digits.npz") as stored:
        packed, values = stored["images"], stored["values"]
    flat = np.stack([packed >> 4, packed & 15], -1).reshape(-1, 8, 8)
    return flat + (flat == 15), values  # 15 stands for 16 too: four bits a pixel


def pack_digits(path: Path) -> None:
    """Write ``digits.npz`` from scikit-learn's copy of the UCI digits (needed once, by us)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = np.minimum(data.images, 15).astype(np.uint8).reshape(-1, 32, 2)
    np.savez_compressed(path, images=levels[..., 0] << 4 | levels[..., 1], values=data.target.astype(np.uint8))
