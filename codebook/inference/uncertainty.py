"""How much a mean over samples is known: intervals that stay honest where the samples are few or all alike."""

from __future__ import annotations

from collections.abc import Sequence

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


def error_by_image(values: np.ndarray, images: Sequence[int] | np.ndarray) -> np.ndarray:
    """Standard error (...) of the mean of values (n, ...), where samples of one image are no independent draws.

    It is that of `std(ddof=1) / sqrt(n)` where each has its own image; infinite where all have the same.
    """
    sums, counts = sums_by_image(values - values.mean(0), images)
    k = len(counts)
    if k < 2:
        return np.full(values.shape[1:], np.inf)
    return np.asarray(np.sqrt(np.sum(sums**2, 0) * k / (k - 1)) / len(values))


def error_over_tasks(errors: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of the mean over tasks, all weighing the same, of values between 0 and 1 or their differences.

    Parameters
    ----------
    errors
        Standard error of each task's mean, from the spread of its samples.
    counts
        Number of independent samples of each task.

    Returns
    -------
    None if a task has fewer than two samples, which show no spread. If the samples of every task are alike, the error
    whose 95% interval is that of the rule of three: what none of n samples does, 3 in n may still do (Hanley and
    Lippman-Hand 1983, doi:10.1001/jama.1983.03330370053031)
    """
    if min(counts) < 2:
        return None
    if max(errors) < ALIKE:
        errors = [min(1.0, 3 / n) / NORMAL_QUANTILE for n in counts]
    return float(sum(error**2 for error in errors) ** 0.5 / len(errors))


def plus_minus(half: float | None, digits: int = 1) -> str:
    """Half an interval's width as text: `± 1.2`, or `± unknown`."""
    return f"± {UNKNOWN if half is None else format(half, f'.{digits}f')}"
