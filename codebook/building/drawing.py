"""Pictures of a build's report: the pilot's distributions, and how the codebook settled."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PILOT_PICTURE, STABILITY_PICTURE = "pilot.png", "stability.png"
PANEL_WIDTH, PANEL_HEIGHT, EDGE = 460, 320, 70
"""Size of a panel with its axes, and the room around what is drawn in it, in pixels."""
INK_COLOUR, FAINT, CURVE, LEVEL_COLOUR = (30, 30, 30), (205, 205, 205), (31, 119, 180), (214, 96, 20)


def pictures(config: dict[str, Any]) -> dict[str, bytes]:
    """The pictures of a codebook's report, by the names of their files."""
    found = {}
    if "pilot" in config:
        found[PILOT_PICTURE] = draw_pilot(config["pilot"], config["settings"])
    if "stability" in config:
        found[STABILITY_PICTURE] = draw_stability(config["stability"])
    return found


def draw_pilot(report: dict[str, Any], settings: dict[str, Any]) -> bytes:
    """PNG of the quantiles of P1 and of the divergences among a pilot's isolated tokens, with the thresholds."""
    page, draw = _page(2, f"pilot: {report['passed']} of {report['probed']} tokens pass, {report['isolated']} isolated")
    for i, (name, tau, title) in enumerate((("p1", "tau_p", "P1"), ("jsd", "tau_j", "JSD"))):
        points = [(share, value) for share, value in report[name]]
        _panel(draw, i, points, settings[tau], f"{title}: tau {settings[tau]:.4g}", "share of isolated tokens", True)
    return _png(page)


def draw_stability(report: dict[str, Any]) -> bytes:
    """PNG of the agreement between the codebooks of n and 2n images, against 2n."""
    page, draw = _page(1, f"kept tokens of {report['set_aside']} images set aside")
    points = [(point["images"], point["agreement"]) for point in report["curve"] if "agreement" in point]
    level = report["agreement"]
    _panel(draw, 0, points, level, f"agreement with half as many (level {level:g})", "images", False)
    return _png(page)


def _page(panels: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    page = Image.new("RGB", (panels * PANEL_WIDTH, PANEL_HEIGHT + 30), "white")
    draw = ImageDraw.Draw(page)
    draw.text((EDGE, 10), title, INK_COLOUR, ImageFont.load_default(16))
    return page, draw


def _panel(
    draw: ImageDraw.ImageDraw, column: int, points: Sequence[tuple[float, float]], level: float, title: str, axis: str,
    logarithmic: bool,
) -> None:  # fmt: skip
    """Draw a curve through points, and a level across it; heights are logarithmic if asked for."""
    font = ImageFont.load_default(13)
    left, top = column * PANEL_WIDTH + EDGE, 60
    right, bottom = (column + 1) * PANEL_WIDTH - 20, PANEL_HEIGHT - 20

    def height(value: float) -> float:
        return math.log10(max(value, 1e-12)) if logarithmic else value

    heights = [height(value) for value in (*(value for _, value in points), level)]
    low, high = min(heights), max(heights)
    across = [x for x, _ in points] or [0.0]
    first, last = (0.0, 1.0) if logarithmic else (min(across), max(across))

    def place(x: float, value: float) -> tuple[float, float]:
        share = (x - first) / (last - first) if last > first else 0.5
        up = (height(value) - low) / (high - low) if high > low else 0.5
        return left + share * (right - left), bottom - up * (bottom - top)

    draw.rectangle((left, top, right, bottom), outline=FAINT)
    draw.text((left, top - 20), title, INK_COLOUR, font)
    for value in (10**low if logarithmic else low, 10**high if logarithmic else high):
        draw.text((left - 8, place(first, value)[1]), f"{value:.2g}", INK_COLOUR, font, anchor="rm")
    for x in sorted({first, last}):
        draw.text((place(x, level)[0], bottom + 12), f"{x:g}", INK_COLOUR, font, anchor="mm")
    draw.text(((left + right) / 2, bottom + 28), axis, INK_COLOUR, font, anchor="mm")
    draw.line((left, place(first, level)[1], right, place(first, level)[1]), LEVEL_COLOUR, 2)
    draw.line([place(*point) for point in points], CURVE, 2)
    for x, y in (place(*point) for point in points):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), CURVE)


def _png(page: Image.Image) -> bytes:
    file = io.BytesIO()
    page.save(file, format="PNG")
    return file.getvalue()
