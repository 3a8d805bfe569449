"""Pictures of which visual tokens were kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from PIL import Image, ImageColor, ImageDraw, ImageFont

from codebook.store.pictures import upright_rgb

SIZE = 576
"""Shortest side of an overlay in pixels: smaller images are enlarged, so that single tokens can be seen."""


def overlay(image: Image.Image, kept: Iterable[int], grid: tuple[int, int]) -> Image.Image:
    """The image beside itself with dropped tokens darkened and kept ones framed.

    Parameters
    ----------
    image
        Any size; the grid is stretched over it.
    kept
        Raster positions of the kept tokens.
    grid
        Rows and columns of visual tokens.
    """
    plain, shown = _enlarge(image, kept, grid)
    width, height = plain.size
    both = Image.new("RGB", (2 * width + 16, height), "white")
    both.paste(plain, (0, 0))
    both.paste(shown, (width + 16, 0))
    return both


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    size = max(one.width for one in pictures), sum(one.height for one in pictures) + 16 * (len(pictures) - 1)
    page, top = Image.new("RGB", size, "white"), 0
    for one in pictures:
        page.paste(one, (0, top))
        top += one.height + 16
    return page


def shown_part(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The part of an image that a model was shown, as `Family.shown_box` says it; its tokens lie on that."""
    (width, height), (left, top, right, bottom) = image.size, box
    return image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))


Way = tuple[str, str, Iterable[int]]
"""One way of answering: a heading, the answer, and the raster positions of the kept tokens."""

LATER = ((214, 39, 40), (31, 119, 255), (44, 160, 44), (148, 70, 220))
"""Colours of tokens that the second stage dropped, the third, and so on; the first stage's are dark."""


def stages_picture(image: Image.Image, stages: Sequence[Iterable[int]], grid: tuple[int, int]) -> Image.Image:
    """The image with what the last stage left framed, and each dropped token in the colour of the stage that did it.

    Parameters
    ----------
    stages
        The raster positions left after each stage, in order; no stage: all are left.
    """
    rows, cols = grid
    left = [set(stage) for stage in stages] or [set(range(rows * cols))]
    plain, shown = _enlarge(image, left[-1], grid)
    for i, (before, after) in enumerate(pairwise(left)):
        for token in before - after:
            box = _patch_box(plain, grid, token)
            shown.paste(Image.blend(shown.crop(box), _filled(box, LATER[i % len(LATER)]), 0.5), box)
    return shown


def mass_picture(
    image: Image.Image, stands: Mapping[int, int], kept: Iterable[int], grid: tuple[int, int]
) -> Image.Image:
    """The image with a line from each dropped token to the kept one that stands for it, both in one colour.

    Parameters
    ----------
    stands
        For each dropped token the kept one, as raster positions.
    """
    plain, shown = _enlarge(image, (), grid)
    line, kept = max(2, plain.width // 288), list(kept)
    colours = {token: ImageColor.getrgb(f"hsl({round(i * 137.5) % 360}, 95%, 62%)") for i, token in enumerate(kept)}
    draw = ImageDraw.Draw(shown)
    for token, to in stands.items():
        draw.line((_patch_centre(plain, grid, token), _patch_centre(plain, grid, to)), colours[to], line)
    for token in kept:
        box = _patch_box(plain, grid, token)
        shown.paste(plain.crop(box), box)
        _frame(draw, box, colours[token], 2 * line)
    return shown


def score_picture(
    image: Image.Image, scores: Mapping[int, float], kept: Iterable[int], grid: tuple[int, int]
) -> Image.Image:
    """The image under its tokens' scores, dark blue for the lowest and yellow for the highest; kept ones are framed."""
    plain = enlarged(image, grid)
    shown = plain.convert("L").convert("RGB")
    low, high = min(scores.values(), default=0), max(scores.values(), default=1)
    for token, score in scores.items():
        share, box = (score - low) / ((high - low) or 1), _patch_box(plain, grid, token)
        shown.paste(Image.blend(shown.crop(box), _filled(box, _heat(share)), 0.7), box)
    draw, line = ImageDraw.Draw(shown), max(2, plain.width // 288)
    for token in kept:
        _frame(draw, _patch_box(plain, grid, token), "white", line)
    return shown


def marked(picture: Image.Image, token: int, grid: tuple[int, int]) -> Image.Image:
    """A picture that one of the functions above drew, with one token framed boldly."""
    left, top, right, bottom = _patch_box(picture, grid, token)
    shown, line = picture.copy(), max(4, picture.width // 120)
    _frame(ImageDraw.Draw(shown), (left - line, top - line, right + line, bottom + line), (255, 0, 160), line)
    return shown


def comparison(drawn: Sequence[tuple[str, str, Image.Image]], note: str = "") -> Image.Image:
    """Pictures of one size side by side, each with a heading and an answer below it, and a note below them all.

    The page is about 1.6 times as wide as high, in rows that leave few places empty.
    """
    (width, height), n = drawn[0][2].size, len(drawn)
    columns = min(range(1, n + 1), key=lambda columns: -n % columns + abs(columns - (1.6 * n) ** 0.5))
    gap, font, spacing = 16, ImageFont.load_default(26), 32  # to be read where the page is half as large
    lines = 2 * spacing + 8
    rows = -(-n // columns)
    size = (columns * (width + gap) + gap, rows * (height + lines + gap) + gap + spacing * bool(note))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for i, (heading, words, shown) in enumerate(drawn):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + lines + gap)
        page.paste(shown, (left, top))
        for line, (text, colour) in enumerate(((heading, (30, 30, 30)), (words, (110, 110, 110)))):
            while text and draw.textlength(text, font) > width:
                text = text[:-2].rstrip() + "…"
            draw.text((left, top + height + 4 + spacing * line), text, colour, font)
    draw.text((gap, size[1] - gap - spacing), note, (110, 110, 110), ImageFont.load_default(22))
    return page


def maps(ways: Sequence[Way], grid: tuple[int, int], width: int, marks: str = "■·") -> str:
    """The same in characters, one per token, as many maps side by side as fit into `width` columns.

    Parameters
    ----------
    marks
        Two characters: for a kept token and for a dropped one.
    """
    rows, cols = grid
    column = max(cols, *(len(heading) for heading, _, _ in ways)) + 3
    across, lines = max(1, width // column), []
    for start in range(0, len(ways), across):
        own = ways[start : start + across]
        for words in zip(*(way[:2] for way in own), strict=True):
            lines.append("".join(text[: column - 3].ljust(column) for text in words).rstrip())
        stays = [set(kept) for _, _, kept in own]
        for row in range(rows):
            drawn = ["".join(marks[row * cols + col not in kept] for col in range(cols)) for kept in stays]
            lines.append("".join(text.ljust(column) for text in drawn).rstrip())
        lines.append("")
    return "\n".join(lines).rstrip()


def enlarged(image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """The image as RGB, so large that single tokens of the grid can be seen, whole patches in whole pixels."""
    scale = max(1, -(-SIZE // min(image.size)))
    width, height = (max(1, round(side * scale / n)) * n for side, n in zip(image.size, grid[::-1], strict=True))
    sampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    return upright_rgb(image).resize((width, height), sampling)


def _enlarge(image: Image.Image, kept: Iterable[int], grid: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """The enlarged image twice: as it is, and with the dropped tokens darkened."""
    plain = enlarged(image, grid)
    shown = Image.blend(plain.convert("L").convert("RGB"), Image.new("RGB", plain.size, "black"), 0.72)
    draw, line = ImageDraw.Draw(shown), max(2, plain.width // 288)
    for token in kept:
        box = _patch_box(plain, grid, token)
        shown.paste(plain.crop(box), box)
        _frame(draw, box, (255, 196, 0), line)
    return plain, shown


def _patch_box(picture: Image.Image, grid: tuple[int, int], token: int) -> tuple[int, int, int, int]:
    """Where a token lies in an enlarged picture, in pixels."""
    (top, left), width, height = divmod(token, grid[1]), picture.width // grid[1], picture.height // grid[0]
    return left * width, top * height, (left + 1) * width, (top + 1) * height


def _frame(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: str | tuple[int, ...], width: int
) -> None:
    """Frame a box, inside its edges."""
    left, top, right, bottom = box
    draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=width)


def _patch_centre(picture: Image.Image, grid: tuple[int, int], token: int) -> tuple[int, int]:
    left, top, right, bottom = _patch_box(picture, grid, token)
    return (left + right) // 2, (top + bottom) // 2


def _filled(box: tuple[int, int, int, int], colour: tuple[int, ...]) -> Image.Image:
    return Image.new("RGB", (box[2] - box[0], box[3] - box[1]), colour)


def _heat(share: float) -> tuple[int, ...]:
    """A colour from dark blue (0) over red to yellow (1), brighter all the way."""
    stops = ((20, 20, 90), (130, 20, 120), (225, 70, 60), (255, 225, 70))
    at = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    low = min(int(at), len(stops) - 2)
    return tuple(round(a + (b - a) * (at - low)) for a, b in zip(stops[low], stops[low + 1], strict=True))
