"""Small charts as inline SVG: they scale, follow the page's colours, and need nothing from a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from codebook.inference.uncertainty import NORMAL_QUANTILE

WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 44
MARKS = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True)
class Point:
    """One mark: `low` to `high` is the interval of `y`; `text` is shown on hovering."""

    x: float
    y: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Series:
    """Marks of one colour and shape, joined by a line; `name` is what a page finds them by."""

    name: str
    points: Sequence[Point]
    colour: str
    shape: str = "circle"
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """A linear map from data, `low` to `high`, to pixels, `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (self.stop - self.start) * (value - self.low) / ((self.high - self.low) or 1)


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An element. Underscores in attribute names become hyphens, floats are rounded, `content` is markup already."""
    texts = {k.rstrip("_").replace("_", "-"): f"{v:.1f}" if isinstance(v, float) else v for k, v in attributes.items()}
    given = "".join(f' {key}="{escape(str(value))}"' for key, value in texts.items())
    return f"<{name}{given}>{content}</{name}>"


def point_list(points: Sequence[tuple[float, float]]) -> str:
    """Points as SVG writes them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers from low to high."""
    raw = (high - low) / count or 1.0
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def mark(shape: str, x: float, y: float, colour: str, text: str = "") -> str:
    """A mark of one of the shapes MARKS, which shows `text` on hovering."""
    title = tag("title", escape(text)) if text else ""
    style = {"fill": colour, "stroke": "var(--card)"}
    if shape == "circle":
        return tag("circle", title, cx=float(x), cy=float(y), r=5, **style)
    shapes: dict[str, list[tuple[float, float]]] = {
        "square": [(-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)],
        "triangle": [(0, -6), (6, 5), (-6, 5)],
        "diamond": [(0, -6.3), (6.3, 0), (0, 6.3), (-6.3, 0)],
    }
    return tag("polygon", title, points=point_list([(x + a, y + b) for a, b in shapes[shape]]), **style)


def frame(x: Axis, y: Axis, percent: bool, counts: tuple[int, int]) -> list[str]:
    """Grid lines with their numbers: about `counts[0]` along the horizontal axis, `counts[1]` along the vertical."""
    parts = []
    for value in ticks(y.low, y.high, counts[1]):
        parts.append(tag("line", class_="grid", x1=x.start, x2=x.stop, y1=y(value), y2=y(value)))
        shown = f"{100 * value:g}" if percent else f"{value:g}"
        parts.append(tag("text", shown, x=x.start - 6, y=y(value) + 4, text_anchor="end"))
    for value in ticks(x.low, x.high, counts[0]):
        parts.append(tag("line", class_="grid", x1=x(value), x2=x(value), y1=y.start, y2=y.stop))
        parts.append(tag("text", f"{value:g}", x=x(value), y=y.start + 16, text_anchor="middle"))
    return parts


def scatter(series: Sequence[Series], x_label: str, y_label: str, frontier: Sequence[Point] = ()) -> str:
    """Points with their intervals, those of a series joined; the frontier dotted."""
    points = [point for own in series for point in own.points]
    xs, ys = [p.x for p in points], [v for p in points for v in (p.low, p.high)]
    pad = 0.04 * ((max(xs) - min(xs)) or 1)
    x = Axis(min(xs) - pad, max(xs) + pad, float(LEFT), float(WIDTH - RIGHT))
    y = Axis(min(ys) - 0.02, max(ys) + 0.02, float(HEIGHT - BOTTOM), float(TOP))
    parts = frame(x, y, True, (6, 6))
    parts.append(tag("text", escape(x_label), x=(x.start + x.stop) / 2, y=HEIGHT - 8, text_anchor="middle"))
    parts.append(tag("text", escape(y_label), x=LEFT + 4, y=TOP + 10))
    if frontier:
        line = point_list([(x(p.x), y(p.y)) for p in frontier])
        parts.append(tag("polyline", class_="frontier", points=line))
    for own in series:
        line = point_list([(x(p.x), y(p.y)) for p in own.points])
        drawn = [tag("polyline", class_="dashed" if own.dashed else "joined", points=line, stroke=own.colour)]
        for p in own.points:
            drawn.append(tag("line", class_="bar", x1=x(p.x), x2=x(p.x), y1=y(p.low), y2=y(p.high), stroke=own.colour))
            drawn.append(mark(own.shape, x(p.x), y(p.y), own.colour, p.text))
        parts.append(tag("g", "".join(drawn), class_="series", data_m=own.name))
    label = f"{y_label} by {x_label}"
    return tag("svg", "".join(parts), class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both x (smaller) and y (larger), from left to right."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def curve(
    values: Sequence[float], errors: Sequence[float | None], start: int, layer: int | None, safe: int | None
) -> str:
    """Loss by layer with its 95% band; the horizon and, dashed, the layer from which pruning is safe.

    Whatever is None is not drawn.
    """
    low = [v - NORMAL_QUANTILE * (e or 0) for v, e in zip(values, errors, strict=True)]
    high = [v + NORMAL_QUANTILE * (e or 0) for v, e in zip(values, errors, strict=True)]
    last = start + len(values) - 1
    x = Axis(start, max(last, start + 1), 34.0, 234.0)
    y = Axis(min(0.0, *low), max(0.05, *high), 108.0, 6.0)
    at = [x(start + i) for i in range(len(values))]
    band = [*zip(at, map(y, high), strict=True), *reversed(list(zip(at, map(y, low), strict=True)))]
    parts = frame(x, y, False, (5, 3))
    if None not in errors:
        parts.append(tag("polygon", class_="band", points=point_list(band)))
    parts.append(tag("polyline", class_="loss", points=point_list(list(zip(at, map(y, values), strict=True)))))
    for place, kind in ((layer, "horizon"), (safe, "safe")):
        if place is not None and start <= place <= last:
            parts.append(tag("line", class_=kind, x1=x(place), x2=x(place), y1=y.start, y2=y.stop))
    return tag(
        "svg", "".join(parts), class_="chart small", viewBox="0 0 240 130", role="img", aria_label="loss by layer"
    )


def steps(values: Sequence[float], whole: float) -> str:
    """Counts layer by layer as bars of 3 pixels."""
    height = 22
    bars = [
        tag("rect", x=4 * i, y=height * (1 - v / whole), width=3, height=height * v / whole, fill="var(--c0)")
        for i, v in enumerate(values)
    ]
    label = ", ".join(f"{v:.0f}" for v in values)
    return tag("svg", "".join(bars), width=4 * len(values), height=height, role="img", aria_label=label)


def dropped(kept: Sequence[int], grid: tuple[int, int]) -> str:
    """The tokens of a grid that are not kept, as one path of unit squares."""
    rows, cols = grid
    stays, found = set(kept), []
    for row in range(rows):
        col = 0
        while col < cols:
            start = col
            while col < cols and row * cols + col not in stays:
                col += 1
            if col > start:
                found.append(f"M{start} {row}h{col - start}v1h{start - col}z")
            col += 1
    return "".join(found)
