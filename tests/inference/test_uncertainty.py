"""Intervals by hand and against the exact binomial one, where few or equal samples would make them look certain."""

import numpy as np
import pytest

from codebook.inference.uncertainty import error_over_tasks, plus_minus, wilson


@pytest.mark.parametrize(("value", "n", "low", "high"), [
    (0.6, 100, 0.5020, 0.6906), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (1.0, 1, 0.2065, 1.0),
])  # fmt: skip
def test_wilson_by_published_values(value, n, low, high):
    assert wilson(value, n) == pytest.approx((low, high), abs=1e-4)


def test_the_error_of_a_mean_over_tasks():
    assert error_over_tasks([0.03, 0.04], [50, 50]) == pytest.approx(0.025)
    assert error_over_tasks([0.03, 0.0], [50, 1]) is None  # one sample shows no spread
    assert error_over_tasks([0.0, 0.04], [50, 50]) == pytest.approx(0.02)


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_samples_that_are_all_alike_are_not_certain(n):
    """What happens to a share p of all samples is missed by n of them with (1 - p)^n: 5% at the bound."""
    bound = 1.96 * error_over_tasks([1e-12], [n])
    assert bound == pytest.approx(1 - 0.05 ** (1 / n), rel=0.2)
    assert error_over_tasks([0.0, 0.0], [n, n]) == pytest.approx(bound / 1.96 / np.sqrt(2))


def test_in_words():
    assert plus_minus(1.25) == "± 1.2" and plus_minus(None) == "± unknown" and plus_minus(0.123, 2) == "± 0.12"
