"""The curve of an information horizon as a picture; needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from codebook.analysis.horizon import Horizon
from codebook.errors import CodebookError


def check() -> None:
    """Raise a CodebookError unless matplotlib is installed."""
    if find_spec("matplotlib") is None:
        raise CodebookError("drawing curves needs matplotlib: pip install 'codebook[plot]', or leave --out away")


def draw(found: Mapping[str, Horizon], start: int, metric: str, path: Path) -> None:
    """Loss by layer, a panel a task: mean with its 95% band, the horizon with its interval, where it is safe to prune.

    Parameters
    ----------
    found
        As `horizons` makes them.
    start
        Layer of the sweep's first value.
    metric
        What the loss is of; the label of the vertical axis.
    path
        Of a PNG file.

    Raises
    ------
    CodebookError
        If matplotlib is not installed.
    """
    check()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (task, one) in zip(panels, found.items(), strict=False):
        layers = range(start, start + len(one.loss))
        bounds = [[a + z * (e or 0) for a, e in zip(one.loss, one.error, strict=True)] for z in (-1.96, 1.96)]
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.fill_between(layers, *bounds, alpha=0.25, linewidth=0)
        panel.plot(layers, one.loss, marker=".")
        panel.axvspan(*one.interval, color="tab:orange", alpha=0.15, linewidth=0)
        panel.axvline(one.layer, color="tab:orange")
        panel.axvline(one.safe, color="tab:green", linestyle="--")
        low, high = one.interval
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(labelbottom=True)  # the panel below may be missing
        panel.set_title(f"{task}: {one.layer} [{low}, {high}], safe {one.safe}", fontsize=9)
    for panel in panels[len(found) :]:
        panel.set_visible(False)
    figure.supxlabel("layer from which no visual token is left", fontsize=9)
    figure.supylabel(f"loss of {metric}", fontsize=9)
    figure.savefig(path, format="png", dpi=110)
