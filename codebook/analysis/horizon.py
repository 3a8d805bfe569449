"""The information horizon: the layer beyond which visual tokens no longer change the answer (arXiv 2512.07580)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from codebook.analysis.layer_sweep import Sweep, check_tasks
from codebook.inference.uncertainty import ONE_SIDED_QUANTILE, UNKNOWN, deviation, error_of_mean, sums_by_image, wilson

EPS = 0.01
"""Largest loss that counts as none."""
LEVEL = 0.95
"""Level of the bootstrap's percentile interval."""
RESAMPLES = 2000
"""Resamples of the bootstrap."""

FEWEST_RIGHT = 3
"""Fewest right answers of the unpruned model to a task that can show a horizon, where right answers are known."""


@dataclass(frozen=True)
class Horizon:
    """The horizon of one task, or of the mean over tasks.

    Attributes
    ----------
    samples : int
        Number of samples.
    full : float
        Mean of the unpruned model.
    pruned, loss, error : list[float], list[float], list[float | None]
        For each layer of the sweep the mean with no visual token from there on, the mean loss, and the loss's standard
        error: None where a task has a single image.
    layer : int
        Smallest l whose loss is at most eps there and at every later layer; L if there is none.
    interval : (int, int)
        Interval of `layer`, by the bootstrap over images.
    safe : int
        Where to prune: upper end of the interval plus a margin. L: nowhere.
    early : list[int]
        Layers before `layer` whose loss is at most eps too. They are not safe: the curve is not monotone.
    gains : list[int]
        Layers where removing helps by more than eps and by more than two standard errors.
    unknown : str, optional
        Why the samples cannot show a horizon: answers that are wrong, or guessed, lose nothing with the image. Then
        `interval` is the whole decoder, and `layer` and `safe` are L: nowhere. None where they can.
    """

    samples: int
    full: float
    pruned: list[float]
    loss: list[float]
    error: list[float | None]
    layer: int
    interval: tuple[int, int]
    safe: int
    early: list[int]
    gains: list[int]
    unknown: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields by name; `layer`, `interval` and `safe` are None where nothing is known."""
        nothing = dict.fromkeys(("layer", "interval", "safe")) if self.unknown else {}
        return asdict(self) | nothing


def first_safe(loss: np.ndarray, eps: float) -> np.ndarray:
    """Smallest layer from which on all losses are at most eps; L if there is none. loss (..., L) -> (...) int64."""
    bad = loss > eps
    last = loss.shape[-1] - bad[..., ::-1].argmax(-1)
    return np.where(bad.any(-1), last, 0)


def horizons(
    sweep: Sweep,
    eps: float = EPS,
    *,
    margin: int | None = None,
    seed: int = 0,
) -> dict[str, Horizon]:
    """The horizon of each task and, as `mean`, of the mean over tasks where there are several.

    Parameters
    ----------
    eps
        Largest loss that counts as none, in the sweep's unit (probability or accuracy).
    margin
        Layers added for safety: missing the horizon by a few can collapse a model. Default: one in sixteen, at least 1.
    seed
        Seed of the bootstrap, which resamples images within their tasks.

    Raises
    ------
    CodebookError
        If one of several tasks is called `mean`.
    """
    margin = max(1, round(sweep.layers / 16)) if margin is None else margin
    rng = np.random.default_rng(seed)
    by_task = sweep.by_task()
    check_tasks(by_task)
    losses = [(sweep.loss[rows], sweep.images_of(rows)) for rows in by_task.values()]
    drawn, apart = resampled(losses, rng, RESAMPLES), [deviation(*own) for own in losses]
    curves = {
        task: _Curve(
            samples=len(rows),
            full=float(sweep.full[rows].mean()),
            pruned=sweep.pruned[rows].mean(0),
            error=own.error,
            losses=draws,
            unknown=_why_unknown(sweep, task, rows),
        )
        for (task, rows), draws, own in zip(by_task.items(), drawn, apart, strict=True)
    }
    if len(curves) > 1:
        curves["mean"] = _mean(curves, error_of_mean(apart))
    return {task: _read_off(curve, sweep.start, eps, margin) for task, curve in curves.items()}


class _Curve(NamedTuple):
    """What a horizon is read from.

    Attributes
    ----------
    samples, full, pruned, unknown
        As in `Horizon`.
    error : (L,) float64
        Standard error of the loss; not finite where a task has a single image.
    losses : (resamples, L) float64
        Mean losses of the bootstrap's resamples.
    """

    samples: int
    full: float
    pruned: np.ndarray
    error: np.ndarray
    losses: np.ndarray
    unknown: str | None


def _mean(curves: Mapping[str, _Curve], error: np.ndarray) -> _Curve:
    """The curve of the mean over tasks."""
    unknown = [task for task, curve in curves.items() if curve.unknown is not None]
    return _Curve(
        samples=sum(curve.samples for curve in curves.values()),
        full=float(np.mean([curve.full for curve in curves.values()])),
        pruned=np.mean([curve.pruned for curve in curves.values()], 0),
        error=error,
        losses=np.mean([curve.losses for curve in curves.values()], 0),
        unknown=f"no horizon is seen in {', '.join(unknown)}" if unknown else None,
    )


def _read_off(curve: _Curve, start: int, eps: float, margin: int) -> Horizon:
    """The horizon of a curve that begins at layer `start`."""
    loss, layers = curve.full - curve.pruned, start + len(curve.pruned)
    shown = {
        "samples": curve.samples, "full": curve.full, "pruned": curve.pruned.tolist(), "loss": loss.tolist(),
        "error": [e if np.isfinite(e) else None for e in curve.error.tolist()], "unknown": curve.unknown,
    }  # fmt: skip
    if curve.unknown is not None:
        return Horizon(**shown, layer=layers, interval=(start, layers), safe=layers, early=[], gains=[])
    layer, ends, tail = start + int(first_safe(loss, eps)), first_safe(curve.losses, eps), (1 - LEVEL) / 2
    low, high = np.quantile(ends, tail, method="lower"), np.quantile(ends, 1 - tail, method="higher")
    interval = start + int(low), start + int(high)
    return Horizon(
        **shown,
        layer=layer,
        interval=interval,
        safe=min(layers, max(layer, interval[1]) + margin),
        early=(start + np.flatnonzero(loss[: layer - start] <= eps)).tolist(),
        gains=(start + np.flatnonzero(-loss > np.maximum(eps, 2 * curve.error))).tolist(),
    )


def resampled(tasks: Sequence[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Means (count, L) of each task's values (n, L) in resamples of their images (n,).

    An image is drawn as often for all tasks that ask about it: with the first of them, among the images new with that.
    """
    times: dict[int, np.ndarray] = {}
    found = []
    for values, images in tasks:
        sums, sizes = sums_by_image(values, images)
        numbers = np.unique(images).tolist()
        if new := [number for number in numbers if number not in times]:
            times |= zip(new, rng.multinomial(len(new), np.full(len(new), 1 / len(new)), count).T, strict=True)
        drawn = np.stack([times[number] for number in numbers], 1)
        total = (drawn @ sizes)[:, None]  # 0 where none was drawn of a task all of whose images are others' too
        found.append(np.where(total > 0, drawn @ sums / np.maximum(total, 1), values.mean(0)))
    return found


def _why_unknown(sweep: Sweep, task: str, rows: np.ndarray) -> str | None:
    """Why some samples cannot show a horizon; None if they can."""
    n, images = len(rows), len(set(sweep.images_of(rows).tolist()))
    if images < 2:
        return f"one {'sample' if n == 1 else 'image'} shows no spread: ask more questions"
    if sweep.right is None or task not in sweep.guesses:
        return None
    right, guess = float(sweep.right[rows].sum()), sweep.guesses[task]
    said = f"the unpruned model answers {right:g} of {n} right"
    remedy = "ask more questions" if right == n else "ask more questions, or such as it can answer"
    if right < FEWEST_RIGHT:
        return f"{said}: {remedy}"
    if wilson(right / n, images, ONE_SIDED_QUANTILE)[0] <= guess:
        return f"{said}, and a guess {guess:.0%}: {remedy}"
    return None


def horizon_table(found: Mapping[str, Horizon], layers: int) -> str:
    """The horizons as plain text, with notes on curves that are not monotone and on layers where removing helps."""

    def name(layer: int) -> str:
        return str(layer) if layer < layers else "none"

    def cells(one: Horizon) -> tuple[str, str, str]:
        if one.unknown:
            return UNKNOWN, UNKNOWN, UNKNOWN
        return name(one.layer), f"{name(one.interval[0])}-{name(one.interval[1])}", name(one.safe)

    lines = [f"{'task':<12}{'samples':>8}{'unpruned':>10}{'horizon':>9}{'interval':>10}{'safe from':>11}"]
    notes = []
    for task, one in found.items():
        layer, between, safe = cells(one)
        lines.append(f"{task:<12}{one.samples:>8}{one.full:>10.3f}{layer:>9}{between:>10}{safe:>11}")
        if one.unknown:
            notes.append(f"{task}: nothing is known: {one.unknown}")
        if one.early:
            notes.append(
                f"{task}: not monotone, the loss is small at layer {layer_runs(one.early)} too, but not at all later "
                "ones"
            )
        if one.gains:
            notes.append(f"{task}: removing all visual tokens helps at layer {layer_runs(one.gains)}")
    if unknown := [task for task, one in found.items() if one.unknown and task != "mean"]:
        last = f"no layer is known to be safe for every task: nothing is known for {', '.join(unknown)}"
    else:
        deepest = max(one.safe for one in found.values())
        last = f"safe for every task: from layer {deepest} of {layers}"
        last = last if deepest < layers else "no layer is safe for every task"
    return "\n".join([*lines, *notes, last])


def layer_runs(layers: Sequence[int]) -> str:
    """Layers in ascending order as text, neighbours joined: 1-4, 7."""
    starts = [a for a in layers if a - 1 not in layers]
    ends = [b for b in layers if b + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
