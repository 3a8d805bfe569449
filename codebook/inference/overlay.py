"""Pictures of which visual tokens were kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

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


def comparison(image: Image.Image, ways: Sequence[Way], grid: tuple[int, int]) -> Image.Image:
    """The tokens that each of several ways kept of the image, side by side, with two lines of text below each."""
    drawn = [(heading, words, _enlarge(image, kept, grid)) for heading, words, kept in ways]
    width, height = drawn[0][2][0].size
    columns = min(len(drawn), max(2, round((len(drawn) * 1.6) ** 0.5)))
    lines, gap, font = 56, 16, ImageFont.load_default(20)
    size = (columns * (width + gap) + gap, -(-len(drawn) // columns) * (height + lines + gap) + gap)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for i, (heading, words, (_, shown)) in enumerate(drawn):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + lines + gap)
        page.paste(shown, (left, top))
        for line, (text, colour) in enumerate(((heading, (30, 30, 30)), (words, (110, 110, 110)))):
            while text and draw.textlength(text, font) > width:
                text = text[:-2].rstrip() + "…"
            draw.text((left, top + height + 4 + 25 * line), text, colour, font)
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


def _enlarge(image: Image.Image, kept: Iterable[int], grid: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """The enlarged image twice: as it is, and with the dropped tokens darkened."""
    scale = max(1, -(-SIZE // min(image.size)))
    # Whole patches in whole pixels, so that frames line up.
    width, height = (max(1, round(side * scale / n)) * n for side, n in zip(image.size, grid[::-1], strict=True))
    plain = upright_rgb(image).resize(
        (width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    )
    shown = Image.blend(plain.convert("L").convert("RGB"), Image.new("RGB", plain.size, "black"), 0.72)
    draw, line = ImageDraw.Draw(shown), max(2, width // 288)
    patch_w, patch_h = width // grid[1], height // grid[0]
    for token in kept:
        top, left = divmod(token, grid[1])
        box = (left * patch_w, top * patch_h, (left + 1) * patch_w, (top + 1) * patch_h)
        shown.paste(plain.crop(box), box)
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=(255, 196, 0), width=line)
    return plain, shown
