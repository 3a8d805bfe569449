"""Budgets against the figures that the papers print, and what a schedule refuses."""

import math

import pytest

from codebook.errors import CodebookError
from codebook.pruning import Random, Schedule, Stage, Uniform

VICUNA = {"layers": 32, "hidden": 4096, "intermediate": 11008}


@pytest.mark.parametrize(
    "stages,average",
    [
        ([(2, 252), (20, 38)], 192.0),  # DART + Random, arXiv 2512.07580
        ([(1, 60), (20, 27)], 63.75),
        ([(0, 284), (20, 38)], 191.75),  # DivPrune + Random
        ([(0, 96), (20, 10)], 63.75),
    ],
)
def test_layer_averages_of_the_information_horizon_paper(stages, average):
    schedule = Schedule([Stage(layer, keep, Random()) for layer, keep in stages])
    assert schedule.budget(576, 32) * 576 == pytest.approx(average)


@pytest.mark.parametrize(
    "stages,reduction",
    [
        ([(3, 182)], 68.6),  # arXiv 2412.13180, 729 tokens
        ([(3, 196)], 66.9),
        ([(3, 243)], 61.2),
        ([(8, 182)], 56.8),
        ([(8, 196)], 55.4),
    ],
)
def test_flops_reductions_of_the_feather_paper(stages, reduction):
    schedule = Schedule([Stage(layer, keep, Uniform()) for layer, keep in stages])
    left = schedule.flops(729, **VICUNA) / Schedule([]).flops(729, **VICUNA)
    assert 100 * (1 - left) == pytest.approx(reduction, abs=0.06)


def test_counts_per_layer():
    schedule = Schedule([Stage(0, 0.25, Uniform()), Stage(2, 3, Random())])
    assert schedule.counts(144, 4) == [36, 36, 3, 3]
    assert schedule.budget(144, 4) == (36 + 36 + 3 + 3) / (4 * 144)
    assert Schedule([]).budget(144, 4) == 1
    assert Stage(0, 0.001, Uniform()).count(144) == 1  # never nothing


def test_text_form():
    made = []
    schedule = Schedule.parse("uniform:0.25, random@9:4", lambda name: made.append(name) or Random())
    assert made == ["uniform", "random"]
    assert [(s.layer, s.keep) for s in schedule.stages] == [(0, 0.25), (9, 4)]


@pytest.mark.parametrize(
    "text,says",
    [
        ("codebok:0.2", "codebok"),
        ("uniform:0.5,random@x:0.1", "random@x:0.1"),
        ("uniform", "uniform"),
        ("", "method"),
        ("uniform:1.5", "1.5"),
        ("uniform:0", "0"),
        ("uniform@3:0.5,random@1:0.1", "ascending"),
        ("uniform:0.1,random@1:0.5", "come back"),
    ],
)
def test_text_errors_name_the_part(text, says):
    with pytest.raises(CodebookError, match=says):
        Schedule.parse(text, lambda name: Uniform())


@pytest.mark.parametrize("keep", [0, 0.0, -1, 1.5, math.nan, math.inf, True])
def test_impossible_budgets(keep):
    with pytest.raises(CodebookError, match="keep must be"):
        Stage(0, keep, Uniform())


def test_counts_larger_than_the_image():
    with pytest.raises(CodebookError, match="lower the count"):
        Schedule([Stage(0, 200, Uniform())]).counts(144, 4)
