"""Procedural scenes: coloured shapes and handwritten numbers on a textured background, alone, in albums and in films.

Everything is integer arithmetic over `numpy.random.Generator(PCG64)`, so that a scene is the same
bytes on every machine: a measurement on seed 7 can be repeated anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from codebook.errors import CodebookError, install_command, unknown

IMAGE_SIDE = 96  # pixels
PATCH = 8
GRID = IMAGE_SIDE // PATCH  # 12 x 12 visual tokens
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
LOOKS = ("plain", "photo", "noise", "scale")
# PNG files of scikit-image's own data, which no training picture shows.
PHOTOS = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel", "motorcycle_left")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FILM_FRAMES = (4, 8)  # fewest and most frames of a film
MIN_INK = 6  # fewest pixels of an object in a patch that shows it


@dataclass(frozen=True)
class Thing:
    """One object: its names, its corner in pixels, how far its shade is from its colour, and how much it has grown."""

    shape: str
    color: str
    size: str
    left: int
    top: int
    tint: tuple[int, ...] = (0, 0, 0)
    growth: int = 0

    @property
    def side(self) -> int:
        return SIZES[self.size] + self.growth

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels, the last two exclusive."""
        return self.left, self.top, self.left + self.side, self.top + self.side

    @property
    def patches(self) -> list[int]:
        """Visual tokens that show it, raster order in the 12 x 12 grid."""
        return np.flatnonzero(_ink(self) >= MIN_INK).tolist()


@dataclass(frozen=True)
class Number:
    """A handwritten number: its digits, which images draw them, its corner in pixels, and how each digit is bent.

    A bend is a shift to the right and down in pixels, a slant in sixteenths, and the ink's strength in sixteenths.
    """

    digits: str
    images: tuple[int, ...]
    left: int
    top: int
    bends: tuple[tuple[int, ...], ...]

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
    numbers : at most one in an ordinary scene, up to three in a dense one
    """

    pixels: np.ndarray
    things: tuple[Thing, ...]
    numbers: tuple[Number, ...] = ()

    @property
    def number(self) -> Number | None:
        return self.numbers[0] if self.numbers else None


@dataclass(frozen=True, eq=False)
class Film:
    """Frames in which one object moves steadily and another one appears.

    Attributes
    ----------
    frames : scenes with the same background
    mover : the object that moves, as it is in the first frame; the first of every frame's things
    move : left, right, up or down
    newcomer : the object that is missing in the first frame; the last of the last frame's things
    """

    frames: tuple[Scene, ...]
    mover: Thing
    move: str
    newcomer: Thing


def scene(split: str, *seed: int, dense: bool = False, look: str = "plain") -> Scene:
    """The scene of a seed.

    Parameters
    ----------
    split : "train" or "test"; they share no seed stream, no digit image and no stripe width
    seed : one or more non-negative integers
    dense : 5 to 14 objects and up to three numbers, for teaching the vision tower
    look : one of LOOKS; all but the first are never trained on: photographs behind (needs scikit-image), noise over
        everything, objects larger by a fifth
    """
    return _Painter(split, int(dense), seed, look).scene((5, 14) if dense else (1, 6), dense=dense)


def album(split: str, *seed: int, count: int | None = None, look: str = "plain") -> tuple[Scene, ...]:
    """Two or three scenes (or `count`); in half of the pairs a shape recurs, in its colour or in another one."""
    painter = _Painter(split, 2, seed, look)
    rng = painter.rng
    drawn = int(rng.integers(100) >= 70) + 2
    count = count or drawn
    scenes = [painter.scene((1, 5)) for _ in range(count - 1)]
    echo = None
    if count == 2 and rng.integers(2):
        things = scenes[0].things
        alone = [t for t in things if sum(o.shape == t.shape for o in things) == 1]
        if alone:
            echo = alone[rng.integers(len(alone))]
            if rng.integers(2):
                others = [c for c in COLOR_NAMES if c != echo.color]
                echo = replace(echo, color=others[rng.integers(len(others))])
    return (*scenes, painter.scene((1, 5), echo=echo))


def film(split: str, *seed: int, count: int | None = None, look: str = "plain") -> Film:
    """A film of four to eight frames (or `count`)."""
    painter = _Painter(split, 3, seed, look)
    rng = painter.rng
    drawn = int(rng.integers(FILM_FRAMES[0], FILM_FRAMES[1] + 1))
    count = count or drawn
    background = painter.background()
    painter.choose()
    move = tuple(MOVES)[rng.integers(len(MOVES))]
    right, down = (x * int(rng.integers(5, max(9, 48 // (count - 1)))) for x in MOVES[move])
    path: list[Thing] = []
    while not path or not all(z > 0 and z + path[-1].side < IMAGE_SIDE for z in (path[-1].left, path[-1].top)):
        start = painter.thing([])
        assert start is not None  # an empty picture has room
        path = [replace(start, left=start.left + i * right, top=start.top + i * down) for i in range(count)]
    ends = path[0].box, path[-1].box
    swept = tuple((min if i < 2 else max)(box[i] for box in ends) for i in range(4))
    still = painter.things((2, 5), [swept])
    since = int(rng.integers(1, count))
    frames = []
    for i, mover in enumerate(path):
        shown = (mover, *still) if i >= since else (mover, *still[:-1])
        frames.append(Scene(painter.draw(background, shown), shown))
    return Film(tuple(frames), path[0], move, still[-1])


def labels(picture: Scene) -> dict[str, np.ndarray]:
    """Say what each patch shows, for the losses that teach the vision tower.

    Returns
    -------
    dict of int64 arrays of shape (144,), -1 where there is nothing: `shape` (index into SHAPES),
    `color` (index into COLORS), `digit`; and `box`, float32 (144, 4): the distances from the
    patch's centre to the left, top, right, bottom of what it shows, in sides of the image.
    """
    out = {name: np.full(GRID * GRID, -1) for name in ("shape", "color", "digit")}
    box = np.zeros((GRID * GRID, 4), np.float32)
    most = np.full(GRID * GRID, MIN_INK - 1)
    index = np.arange(GRID * GRID)
    centre = np.stack([index % GRID, index // GRID] * 2, 1) * PATCH + PATCH // 2
    for thing in picture.things:
        ink = _ink(thing)
        mine = ink > most
        most = np.where(mine, ink, most)
        out["shape"][mine] = SHAPES.index(thing.shape)
        out["color"][mine] = COLOR_NAMES.index(thing.color)
        box[mine] = (np.array(thing.box) - centre[mine]) / IMAGE_SIDE
    for number in picture.numbers:
        box[number.patches] = (np.array(number.box) - centre[number.patches]) / IMAGE_SIDE
        for place in number.patches:
            column = (place % GRID * PATCH - number.left) // DIGIT
            out["digit"][place] = int(number.digits[column])
    return {**out, "box": box}


Box = tuple[int, ...]  # left, top, right, bottom


class _Painter:
    """Draws from one seeded stream."""

    def __init__(self, split: str, kind: int, seed: Sequence[int], look: str):
        if split not in SPLITS:
            raise unknown("no split", split, SPLITS)
        if look not in LOOKS:
            raise unknown("no look", look, LOOKS)
        self.rng = np.random.Generator(np.random.PCG64([SPLITS[split], kind, *seed]))
        self.split, self.look = split, look

    def scene(self, count: tuple[int, int], *, dense: bool = False, echo: Thing | None = None) -> Scene:
        """A scene of `count[0]` to `count[1]` things; one of them is `echo`, if given, and unlike the others."""
        rng = self.rng
        background = self.background()
        numbers: list[Number] = []
        for _ in range(int(rng.integers(4)) if dense else int(rng.integers(100) < 70)):
            number = self.number([n.box for n in numbers])
            numbers += [number] if number else []
        self.choose(echo)
        things = self.things(count, [n.box for n in numbers], echo)
        return Scene(self.draw(background, things, numbers), things, tuple(numbers))

    def choose(self, echo: Thing | None = None) -> None:
        """Half of the scenes repeat few colours and shapes, so that names must be bound to objects."""
        rng = self.rng
        colors = [COLOR_NAMES[i] for i in rng.permutation(len(COLORS))]
        shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
        if int(rng.integers(100)) < 50:
            colors, shapes = colors[: rng.integers(2, 4)], shapes[: rng.integers(2, 4)]
        self.colors, self.shapes = colors, [s for s in shapes if echo is None or s != echo.shape]

    def things(self, count: tuple[int, int], taken: Sequence[Box], echo: Thing | None = None) -> tuple[Thing, ...]:
        found: list[Thing] = []
        for i in range(int(self.rng.integers(count[0], count[1] + 1))):
            thing = self.thing([*taken, *(t.box for t in found)], echo if i == 0 else None)
            found += [thing] if thing else []
        return tuple(found)

    def thing(self, taken: Sequence[Box], echo: Thing | None = None) -> Thing | None:
        rng = self.rng
        color, shape = self.colors[rng.integers(len(self.colors))], self.shapes[rng.integers(len(self.shapes))]
        if echo:
            color, shape = echo.color, echo.shape
        size = "big" if rng.integers(100) < 40 else "small"
        tint = tuple(rng.integers(-14, 15, size=3).tolist())
        growth = SIZES[size] // 5 if self.look == "scale" else 0
        for left, top in rng.integers(1, IMAGE_SIDE - SIZES[size] - growth, size=(24, 2)).tolist():
            thing = Thing(shape, color, size, left, top, tint, growth)
            if _free(thing.box, taken):
                return thing
        return None

    def number(self, taken: Sequence[Box]) -> Number | None:
        rng = self.rng
        values = digits()[1]
        train = self.split == "train"
        first, last = (0, TRAIN_DIGITS) if train else (TRAIN_DIGITS, len(values))
        images = tuple(rng.integers(first, last, size=rng.integers(1, 5)).tolist())
        text = "".join(str(values[i]) for i in images)
        # 1,300 images are few: training bends them, the test split shows them as they are.
        bends = rng.integers((-1, -1, -3, 13), (2, 2, 4, 17), size=(len(images), 4)).tolist()
        bent = tuple(map(tuple, bends)) if train else ((0, 0, 0, 16),) * len(images)
        # On the patch grid: a digit is 2 x 2 visual tokens.
        columns = GRID - 2 * len(images) + 1
        for left, top in zip(rng.integers(columns, size=8).tolist(), rng.integers(GRID - 1, size=8), strict=True):
            number = Number(text, images, left * PATCH, int(top) * PATCH, bent)
            if _free(number.box, taken):
                return number
        return None

    def draw(self, background: np.ndarray, things: Sequence[Thing], numbers: Sequence[Number] = ()) -> np.ndarray:
        pixels = background.copy()
        for number in numbers:
            _draw_number(pixels, number)
        for thing in things:
            left, top, right, bottom = thing.box
            color = np.clip(np.array(COLORS[thing.color]) + thing.tint, 0, 255)
            pixels[top:bottom, left:right][_shape_mask(thing.shape, thing.side)] = color
        if self.look == "noise":
            pixels = np.clip(pixels + self.rng.integers(-30, 31, size=pixels.shape), 0, 255)
        return pixels.astype(np.uint8)

    def background(self) -> np.ndarray:
        """Muted tones, so that neither the saturated objects nor the white digits vanish in it."""
        rng = self.rng
        if self.look == "photo":
            return _photo(rng)
        kind, periods = BACKGROUNDS[rng.integers(len(BACKGROUNDS))], PERIODS[self.split]
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
            small = rng.integers(-28, 29, size=(IMAGE_SIDE // cell, IMAGE_SIDE // cell, 1))
            pixels = tones[0] + small.repeat(cell, 0).repeat(cell, 1)
        else:
            scale = max(abs(dx), abs(dy))
            dark = (x * dx + y * dy) // (period * scale) if kind == "stripe" else x // period + y // period
            pixels = tones[dark % 2]
        return np.clip(pixels + rng.integers(-5, 6, size=(IMAGE_SIDE, IMAGE_SIDE, 1)), 0, 255)


def _free(box: Box, taken: Sequence[Box]) -> bool:
    left, top, right, bottom = box
    return all(right < a or c < left or bottom < b or d < top for a, b, c, d in taken)


def _draw_number(pixels: np.ndarray, number: Number) -> None:
    images = digits()[0]
    rows, columns = np.indices((DIGIT, DIGIT))
    for place, (index, (right, down, slant, strength)) in enumerate(zip(number.images, number.bends, strict=True)):
        ink = images[index].astype(np.int64).repeat(2, 0).repeat(2, 1)
        y, x = rows - down, columns - right - (rows - DIGIT // 2) * slant // 16
        inside = (y >= 0) & (y < DIGIT) & (x >= 0) & (x < DIGIT)
        ink = np.where(inside, ink[y % DIGIT, x % DIGIT], 0)[..., None] * strength // 16
        left = number.left + place * DIGIT
        under = pixels[number.top : number.top + DIGIT, left : left + DIGIT]
        under[...] = (under * (16 - ink) + 250 * ink) // 16


def _photo(rng: np.random.Generator) -> np.ndarray:
    """A crop of a photograph, its contrast halved."""
    picture = _picture(PHOTOS[rng.integers(len(PHOTOS))])
    stride = int(rng.integers(1, min(picture.shape[:2]) // IMAGE_SIDE + 1))
    top, left = (int(rng.integers(size - IMAGE_SIDE * stride + 1)) for size in picture.shape[:2])
    return (
        40
        + picture[top:, left:][: IMAGE_SIDE * stride : stride, : IMAGE_SIDE * stride : stride].astype(np.int64)
        * 140
        // 255
    )


@cache
def _picture(name: str) -> np.ndarray:
    try:
        from skimage import data_dir  # type: ignore[attr-defined]
    except ImportError:
        raise CodebookError(f"photographs need scikit-image: `{install_command('miniature')}`") from None
    from PIL import Image

    with Image.open(Path(data_dir) / f"{name}.png") as picture:
        return np.asarray(picture.convert("RGB"))


@cache
def _plane() -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.indices((IMAGE_SIDE, IMAGE_SIDE))
    return columns, rows


@cache
def _shape_mask(shape: str, side: int) -> np.ndarray:
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
    canvas = np.zeros((IMAGE_SIDE, IMAGE_SIDE), np.int64)
    left, top, right, bottom = thing.box
    canvas[top:bottom, left:right] = _shape_mask(thing.shape, thing.side)
    return canvas.reshape(GRID, PATCH, GRID, PATCH).sum((1, 3)).ravel()


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The UCI digits of scikit-learn, shipped with the package: uint8 (1797, 8, 8) in 0..16, and their values."""
    with np.load(Path(__file__).parent / "digits.npz") as stored:
        packed, values = stored["images"], stored["values"]
    flat = np.stack([packed >> 4, packed & 15], -1).reshape(-1, 8, 8)
    return flat + (flat == 15), values  # 15 stands for 16 too: four bits a pixel
