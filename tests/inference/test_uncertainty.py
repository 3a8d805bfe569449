"""Intervals by hand and against the exact binomial one, where few or equal samples would make them look certain."""

import numpy as np
import pytest

from codebook.inference.uncertainty import Deviation, deviation, error_of_mean, error_over_tasks, plus_minus, wilson


@pytest.mark.parametrize(("value", "n", "low", "high"), [
    (0.6, 100, 0.5020, 0.6906), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (1.0, 1, 0.2065, 1.0),
])  # fmt: skip
def test_wilson_by_published_values(value, n, low, high):
    assert wilson(value, n) == pytest.approx((low, high), abs=1e-4)


def task(error, n, start=0):
    """A task of n images, numbered from `start`, whose mean has this standard error."""
    return Deviation(np.full(n, error / n**0.5), np.arange(start, start + n))


def test_the_error_of_a_mean_over_tasks():
    assert error_over_tasks([task(0.03, 50), task(0.04, 50, 50)]) == pytest.approx(0.025)
    assert error_over_tasks([task(0.03, 50), task(0.0, 1, 50)]) is None  # one sample shows no spread
    assert error_over_tasks([task(0.0, 50), task(0.04, 50, 50)]) == pytest.approx(0.02)


def test_tasks_about_the_same_images_do_not_deviate_on_their_own():
    """Two equal tasks know no more than one; of opposite ones the mean is certain."""
    assert error_over_tasks([task(0.03, 50), task(0.03, 50)]) == pytest.approx(0.03)
    assert error_over_tasks([task(0.03, 50), task(-0.03, 50)]) == pytest.approx(0)
    assert error_over_tasks([task(0.0, 50), task(0.0, 50)]) == pytest.approx(3 / 50 / 1.96)


def test_the_error_over_tasks_is_that_of_a_bootstrap_over_images():
    """Half of the images of two tasks are those of the other, with as hard questions; some have two questions."""
    rng = np.random.default_rng(0)
    hard = rng.normal(size=150)
    images = [np.concatenate([np.arange(100), np.arange(30)]), np.arange(50, 150)]
    values = [hard[own] + rng.normal(size=len(own)) / 2 for own in images]
    found = error_of_mean([deviation(*one) for one in zip(values, images, strict=True)])
    drawn = rng.multinomial(150, np.full(150, 1 / 150), 8000)
    means = [drawn[:, own] @ value / drawn[:, own].sum(1) for own, value in zip(images, values, strict=True)]
    assert found == pytest.approx(np.mean(means, 0).std(), rel=0.05)
    apart = [deviation(value, own + 1000 * i) for i, (value, own) in enumerate(zip(values, images, strict=True))]
    assert error_of_mean(apart) < 0.9 * found


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_samples_that_are_all_alike_are_not_certain(n):
    """What happens to a share p of all samples is missed by n of them with (1 - p)^n: 5% at the bound."""
    bound = 1.96 * error_over_tasks([task(1e-12, n)])
    assert bound == pytest.approx(1 - 0.05 ** (1 / n), rel=0.2)
    assert error_over_tasks([task(0.0, n), task(0.0, n, n)]) == pytest.approx(bound / 1.96 / np.sqrt(2))


def test_in_words():
    assert plus_minus(1.25) == "± 1.2" and plus_minus(None) == "± unknown"
