"""How much a mean over samples is known: intervals that stay honest where the samples are few or all alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NORMAL_QUANTILE = 1.96
"""Standard normal quantile of a 95% interval."""

ONE_SIDED_QUANTILE = 1.645
"""Standard normal quantile of a one-sided test at 5%."""

ALIKE = 1e-9
"""Standard error of values that are all alike: by rounding it is about 1e-17, and by finite differences 1e-10."""

UNKNOWN = "unknown"
"""Text that stands where a number or an interval would claim more than the samples show."""


def wilson(value: float, n: float, z: float = NORMAL_QUANTILE) -> tuple[float, float]:
    """Wilson's interval of a share `value` of `n` independent samples (Wilson 1927, doi:10.2307/2276774).

    It lies between 0 and 1, and is not empty where the share is 0 or 1.

    Parameters
    ----------
    z
        Standard normal quantile of the interval; default: of 95%.
    """
    centre, scale = (value + z**2 / (2 * n)) / (1 + z**2 / n), z / (1 + z**2 / n)
    half = scale * (value * (1 - value) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def sums_by_image(values: np.ndarray, images: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the values (n, ...) of each image's samples, and how many these are: (k, ...) and (k,) float64."""
    _, which = np.unique(np.asarray(images), return_inverse=True)
    sums = np.zeros((which.max() + 1, *values.shape[1:]))
    np.add.at(sums, which, values)
    return sums, np.bincount(which).astype(float)


class Deviation(NamedTuple):
    """What each image contributes to the deviation of a mean: its standard error is the root of the sum of squares.

    Attributes
    ----------
    parts : (k, ...) float64
        The contributions.
    images : (k,) int64
        Numbers of the images.
    """

    parts: np.ndarray
    images: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """Standard error (...) of the mean; infinite where there is one image."""
        return error_of_mean([self])


def deviation(values: np.ndarray, images: Sequence[int] | np.ndarray) -> Deviation:
    """The deviation of the mean of values (n, ...), where samples of one image are no independent draws.

    Its error is that of `std(ddof=1) / sqrt(n)` where each has its own image.
    """
    sums, counts = sums_by_image(values - values.mean(0), images)
    k = len(counts)
    return Deviation(sums * np.sqrt(k / max(1, k - 1)) / len(values), np.unique(np.asarray(images)))


def error_of_mean(tasks: Sequence[Deviation]) -> np.ndarray:
    """Standard error (...) of the mean over tasks, all weighing the same; infinite where one of them has one image.

    The deviations of tasks are added image by image: those that ask about the same images do not deviate on their own.
    """
    if min(len(task.images) for task in tasks) < 2:
        return np.full(tasks[0].parts.shape[1:], np.inf)
    parts, images = (np.concatenate(every) for every in zip(*tasks, strict=True))
    parts, _ = sums_by_image(parts, images)
    return np.asarray(np.sqrt(np.sum(parts**2, 0)) / len(tasks))


def error_over_tasks(tasks: Sequence[Deviation]) -> float | None:
    """Standard error of the mean over tasks, all weighing the same, of values between 0 and 1 or their differences.

    Returns
    -------
    That of `error_of_mean`. None if a task has one image, which shows no spread. If the samples of every task are
    alike, the error whose 95% interval is that of the rule of three: what none of n samples does, 3 in n may still do
    (Hanley and Lippman-Hand 1983, doi:10.1001/jama.1983.03330370053031)
    """
    if min(len(task.images) for task in tasks) < 2:
        return None
    alike = max(float(task.error) for task in tasks) < ALIKE
    return float(error_of_mean([_rule_of_three(task.images) for task in tasks] if alike else tasks))


def _rule_of_three(images: np.ndarray) -> Deviation:
    n = len(images)
    return Deviation(np.full(n, min(1.0, 3 / n) / NORMAL_QUANTILE / n**0.5), images)


def plus_minus(half: float | None) -> str:
    """Half an interval's width as text: `± 1.2`, or `± unknown`."""
    return f"± {UNKNOWN if half is None else f'{half:.1f}'}"
