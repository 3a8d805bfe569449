"""Pictures for people: which visual tokens were kept."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageDraw

SIZE = 576
"""Least side of an overlay in pixels: small images are enlarged so that single tokens can be seen."""


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
    scale = max(1, -(-SIZE // min(image.size)))
    # Whole patches in whole pixels, so that frames line up.
    width, height = (max(1, round(side * scale / n)) * n for side, n in zip(image.size, grid[::-1], strict=True))
    plain = image.convert("RGB").resize(
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
    both = Image.new("RGB", (2 * width + 16, height), "white")
    both.paste(plain, (0, 0))
    both.paste(shown, (width + 16, 0))
    return both
