"""A picture of where a codebook's prototypes come from: one row per cluster, the token framed in each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from codebook.building.sources import Source
from codebook.errors import CodebookError, counted

SHEET_ROWS, SHEET_COLUMNS = 12, 8
"""Most rows (clusters) and columns (images) of the picture."""
TILE_SIDE, GAP, LABEL = 168, 12, 150
"""Side of an image, gap between images, and width of the words before a row, in pixels."""
FRAME_COLOUR, TEXT_COLOUR, LABEL_COLOUR = (255, 196, 0), (30, 30, 30), (120, 120, 120)


def sheet(
    provenance: Sequence[dict[str, Any]], grid: tuple[int, int], sources: Sequence[Source], title: str
) -> Image.Image:
    """A picture of up to 12 clusters, the largest first, and of each up to 8 images, spread evenly over its members.

    Parameters
    ----------
    provenance
        A codebook's provenance, with `image`, `row`, `col` and `cluster`.
    grid
        Rows and columns of an image's visual tokens.
    sources
        Where to look for the images, in this order.

    Raises
    ------
    CodebookError
        If a prototype does not say where it is from, or is from outside of the grid, or none of the images is found.
    """
    if not all({"image", "row", "col"} <= row.keys() for row in provenance):
        raise CodebookError("this codebook does not say which patches its prototypes are: leave --sheet out")
    for row in provenance:
        if row["row"] >= grid[0] or row["col"] >= grid[1]:
            raise CodebookError(
                f"a prototype is from patch {row['row']},{row['col']} of {row['image']}, outside of the grid of "
                f"{grid[0]} x {grid[1]}: rebuild with `codebook build`"
            )
    clusters: dict[int, dict[str, dict[str, Any]]] = {}
    for row in provenance:
        clusters.setdefault(row["cluster"], {}).setdefault(row["image"], row)  # one token per image
    sizes = Counter(row["cluster"] for row in provenance)
    chosen = sorted(clusters, key=lambda cluster: (-sizes[cluster], cluster))[:SHEET_ROWS]
    width = LABEL + SHEET_COLUMNS * (TILE_SIDE + GAP) + GAP
    page = Image.new("RGB", (width, 60 + len(chosen) * (TILE_SIDE + GAP) + GAP), "white")
    draw, font, large = ImageDraw.Draw(page), ImageFont.load_default(18), ImageFont.load_default(24)
    draw.text((GAP, 18), title, TEXT_COLOUR, large)
    shown, missing = 0, ""
    for i, cluster in enumerate(chosen):
        top = 60 + i * (TILE_SIDE + GAP)
        rows = list(clusters[cluster].values())
        words = (f"cluster {cluster}", counted(sizes[cluster], "prototype"), counted(len(rows), "image"))
        for line, (text, colour) in enumerate(zip(words, (TEXT_COLOUR, LABEL_COLOUR, LABEL_COLOUR), strict=True)):
            draw.text((GAP, top + TILE_SIDE // 2 - 36 + 24 * line), text, colour, font)
        count = min(SHEET_COLUMNS, len(rows))
        for column in range(count):
            row = rows[column * len(rows) // count]
            picture = _find_picture(row["image"], sources)
            if picture is None:
                missing = missing or row["image"]
                continue
            page.paste(_tile(picture, row, grid), (LABEL + column * (TILE_SIDE + GAP), top))
            shown += 1
    if not shown:
        raise CodebookError(f"none of the codebook's images is there ({missing} first): give the --images it came from")
    return page


def _find_picture(name: str, sources: Sequence[Source]) -> Image.Image | None:
    for source in sources:
        for known in (name, name.partition("/")[2]):  # `extend` may have put the folder's name before it
            if known in source.names:
                try:
                    return source.read(known)
                except Exception:  # damaged since
                    continue
    return None


def _tile(picture: Image.Image, row: dict[str, Any], grid: tuple[int, int]) -> Image.Image:
    """The image, slightly faded, its token bright and framed, and enlarged in the corner farthest from it."""
    sharp = Image.Resampling.NEAREST if max(picture.size) < TILE_SIDE else Image.Resampling.LANCZOS
    tile = picture.resize((TILE_SIDE, TILE_SIDE), sharp)
    left, right = (round((row["col"] + step) * TILE_SIDE / grid[1]) for step in (0, 1))
    top, bottom = (round((row["row"] + step) * TILE_SIDE / grid[0]) for step in (0, 1))
    patch = tile.crop((left, top, right, bottom))
    page = Image.blend(tile, Image.new("RGB", tile.size, "white"), 0.35)
    page.paste(patch, (left, top))
    draw, zoom = ImageDraw.Draw(page), TILE_SIDE // 4
    draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=FRAME_COLOUR, width=2)
    corner = (0 if left > TILE_SIDE // 2 else TILE_SIDE - zoom, 0 if top > TILE_SIDE // 2 else TILE_SIDE - zoom)
    page.paste(patch.resize((zoom, zoom), sharp), corner)
    draw.rectangle((*corner, corner[0] + zoom - 1, corner[1] + zoom - 1), outline=FRAME_COLOUR, width=2)
    return page
