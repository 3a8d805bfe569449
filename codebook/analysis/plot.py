"""Curves of an information horizon as a picture; needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from codebook.analysis.horizon import Horizon
from codebook.errors import CodebookError, install_command
from codebook.inference.uncertainty import NORMAL_QUANTILE, UNKNOWN


def require_matplotlib() -> None:
    """Raise a CodebookError unless matplotlib is installed."""
    if find_spec("matplotlib") is None:
        raise CodebookError(f"drawing curves needs matplotlib: `{install_command('plot')}`, or leave --out away")


def draw_horizons(found: Mapping[str, Horizon], start: int, metric: str, path: Path) -> None:
    """Draw loss by layer, one panel per task: mean and 95% band, horizon and interval, and where pruning is safe.

    Parameters
    ----------
    found
        Horizons by task, from `horizons`.
    start
        First layer of the sweep.
    metric
        Name of the measure that is lost, for the vertical axis.
    path
        PNG file to write.

    Raises
    ------
    CodebookError
        If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    beside = (1, 3, 5, 5)[columns - 1]  # entries of the legend that fit the width
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows + 0.8 * (beside == 1)), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (task, one) in zip(panels, found.items(), strict=False):
        layers = range(start, start + len(one.loss))
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.plot(layers, one.loss, marker=".", label="loss, mean over questions")
        if None not in one.error:
            errors = [error for error in one.error if error is not None]
            bounds = [
                [a + z * e for a, e in zip(one.loss, errors, strict=True)] for z in (-NORMAL_QUANTILE, NORMAL_QUANTILE)
            ]
            panel.fill_between(layers, *bounds, alpha=0.25, linewidth=0, label="its 95% interval")
        title = f"{task}: {UNKNOWN}"
        if not one.unknown:
            if one.layer < layers.stop:  # behind the last layer there is none
                panel.axvline(one.layer, color="tab:orange", label="horizon")
            panel.axvspan(
                *one.interval, color="tab:orange", alpha=0.15, linewidth=0, label="95% interval of the horizon"
            )
            if one.safe < layers.stop:
                panel.axvline(one.safe, color="tab:green", linestyle="--", label="pruning is safe from here")
            layer, first, last, safe = (
                str(at) if at < layers.stop else "none" for at in (one.layer, *one.interval, one.safe)
            )
            title = f"{task}: {layer} [{first}, {last}], safe {safe}"
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(labelbottom=True)  # there may be no panel below with labels of its own
        panel.set_title(title, fontsize=9)
    for panel in panels[len(found) :]:
        panel.set_visible(False)
    shown = dict(pair for panel in panels for pair in zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside upper right", ncols=beside, fontsize=8)
    figure.supxlabel("layer from which no visual token is left", fontsize=9)
    figure.supylabel(f"loss of {metric}", fontsize=9)
    figure.savefig(path, format="png", dpi=110)
