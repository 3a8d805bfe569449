"""Presets and the one budget, by numbers worked out by hand and by what must hold for any."""

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codebook.errors import CodebookError
from codebook.pruning import METHODS, Schedule
from codebook.pruning.presets import SCHEDULE_PRESETS, feather, scaled

OWN = "fastv(own_layer=True)"
VICUNA = {"layers": 32, "hidden": 4096, "intermediate": 11008}


def solve(text, keep=None, n=576, layers=32, **options):
    return Schedule.solve(text, "book", n=n, layers=layers, keep=keep, **options)


@pytest.mark.parametrize(
    "text,keep,deep,solved,average",
    [
        # arXiv 2512.07580; 192 and 64 tokens are 6144 and 2048 in one layer.
        ("dart+random", 192, 38, "dart@2:252, random@20:38", 192.0),  # 6144 - 2 * 576 - 12 * 38 = 18 * 252
        ("dart@1+random", 64, 27, "dart@1:60, random@20:27", 63.75),  # 2048 - 576 - 12 * 27 = 19 * 60 + 8
        ("divprune+random", 192, 38, "divprune:284, random@20:38", 191.75),  # 6144 - 12 * 38 = 20 * 284 + 8
        ("divprune+random", 64, 10, "divprune:96, random@20:10", 63.75),  # 2048 - 12 * 10 = 20 * 96 + 8
        # The paper's 260 and 98 tokens with all dropped from layer 21 on are not the closest: 262 and 97 are.
        ("dart+drop", 192, None, "dart@2:262, drop@21", 191.5625),  # 6144 - 2 * 576 = 19 * 262 + 14
        ("divprune+drop", 64, None, "divprune:97, drop@21", 63.65625),  # 2048 = 21 * 97 + 11
        # A seventh of the first: 20 * 283 + 12 * 40 = 6140, and 20 * 284 + 12 * 41 is too many.
        ("divprune+random", 192, None, "divprune:283, random@20:40", 191.875),
        ("codebook+random", 0.11, None, "codebook:93, random@20:13", 63.0),  # 2027 are allowed, 94 would make 2036
        ("fastv", 192, None, "fastv@2:166", 191.625),  # 6144 - 2 * 576 = 30 * 166 + 12
        ("fastv@3", 192, None, "fastv@3:152", 191.75),  # 6144 - 3 * 576 = 29 * 152 + 8
        ("codebook", 0.11, None, "codebook:63", 63.0),  # 63.36
        ("codebook+mass", 0.11, None, "codebook:63+mass", 63.0),
        ("seeded", 0.11, None, "codebook-farthest:63+mass", 63.0),
        ("seeded+random", 0.11, None, "codebook-farthest:93+mass, random@20:13", 63.0),
        ("dart@1+mass+random+mass", 64, 27, "dart@1:60+mass, random@20:27+mass", 63.75),
        ("vtw", 0.5, None, "drop@16", 288.0),
        ("vtw", 0.33, None, "drop@10", 180.0),
        # 0.25 = (m + k) / 2 with m = k + 0.2 (1 - k): k = 1/6 and m = 1/3
        ("deft", 0.25, None, "cls:192, fastv(query='question')@16:96", 144.0),
        # k = 0.01 / 0.9 and m = 0.208889: 121 and 7, one token too many for 0.11 * 18432 = 2027 = 16 * 126 + 11
        ("deft", 0.11, None, "cls:120, fastv(query='question')@16:6", 63.0),
        ("deft", 64, None, "cls:121, fastv(query='question')@16:7", 64.0),  # 7 + ceil(0.2 * 569)
        # In proportion 8 : 4 : 1: (12 * 8 + 12 * 4 + 8) x = 18432 / 4 and x = 30.3: 242 : 121 : 30, 4596 of 4608
        ("tops-2; positions=keep", 0.25, None, "tops:242, tops-text@12:121, tops-text@24:30", 143.625),
        # 7 : 1 in halves: 16 * (110 + 16) = 2016 of 2027
        ("nuwa-2", 0.11, None, "nuwa:110, fastv@16:16", 63.0),
        # In proportion 4 : 2 : 1, by halves up: 8 * 576 + 8 * (8 + 4 + 2) = 4720 <= 0.26 * 18432 = 4792 < 4608 + 8 * 23
        ("pyramiddrop", 0.26, None, f"{OWN}@8:13, {OWN}@16:7, {OWN}@24:3; positions=compact", 149.75),
        ("pyramiddrop; positions=keep", 0.26, None, f"{OWN}@8:13, {OWN}@16:7, {OWN}@24:3", 149.75),
    ],
)
def test_counts_that_meet_a_budget(text, keep, deep, solved, average):
    schedule = solve(text, keep, deep=deep)
    assert str(schedule) == solved and schedule.budget(576, 32) * 576 == average


def test_settings_of_the_authors():
    assert solve("pyramiddrop").counts(576, 32) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert solve("pyramiddrop").budget(576, 32) == 0.46875
    # 300, 200 and 110, and averages: 1 + floor(m / 10) for m = 1 + floor(0.3 * 276) = 83, then 33 and 29
    assert solve("sparsevlm").counts(576, 32) == [576] * 3 + [309] * 4 + [204] * 9 + [113] * 16
    assert solve("vtw").counts(576, 32) == [576] * 16 + [0] * 16
    # 80% "pruned": K = round(0.2 * 576) and M = K + ceil(0.2 * 461), on average 0.28
    assert solve("deft").counts(576, 32) == [208] * 16 + [115] * 16
    assert solve("feather", n=729).counts(729, 32) == [729] * 8 + [275] * 8 + [24] * 16
    # What TOPS calls 128 tokens are 12 * 256 + 12 * 128 + 8 * 32 = 4864 in 32 layers, 152 on average; Nuwa's are 128.
    assert solve("tops-2").counts(576, 32) == [256] * 12 + [128] * 12 + [32] * 8
    assert solve("tops-2").budget(576, 32) * 576 == 152 and solve("tops-2").positions == "compact"
    assert solve("nuwa-2").counts(576, 32) == [224] * 16 + [32] * 16
    assert solve("nuwa-2").budget(576, 32) * 576 == 128


def test_what_the_user_says_goes_before_a_presets_setting():
    assert solve("sparsevlm").positions == "compact" and solve("sparsevlm; positions=keep").positions == "keep"
    assert solve("sparsevlm; quotas=shared").positions == "compact"
    with pytest.raises(CodebookError, match="says positions twice"):
        solve("sparsevlm; positions=keep; positions=keep")


def test_flops_of_feather_from_its_own_budget():
    for schedule in (solve("feather", n=729), solve(feather(0.7, 729))):
        assert schedule.counts(729, 32)[8::8] == [275, 24, 24]
        assert 100 * schedule.flops_reduction(729, **VICUNA) == pytest.approx(64.2, abs=0.05)
    # The paper's ensemble of 182 by phi_-R and 81 of the grid, less the 20 of both, at K = 3
    assert "@8:243" in feather(0.75, 729) and "share=0.3333" in feather(0.75, 729)
    ensemble = solve("feather-ensemble@3:243", n=729)
    assert 100 * ensemble.flops_reduction(729, **VICUNA) == pytest.approx(61.2, abs=0.05)


@pytest.mark.parametrize(
    "layers,expected",
    [
        (32, [0, 2, 6, 8, 15, 16, 20, 21, 24]),
        (12, [0, 1, 2, 3, 6, 6, 8, 8, 9]),  # 0.75, 2.25, 3, 5.625, 6, 7.5, 7.875, 9
        (28, [0, 2, 5, 7, 13, 14, 18, 18, 21]),  # 1.75, 5.25, 7, 13.125, 14, 17.5, 18.375, 21
        (40, [0, 3, 8, 10, 19, 20, 25, 26, 30]),  # 2.5, 7.5, 10, 18.75, 20, 25, 26.25, 30
        (4, [0, 1, 1, 1, 2, 2, 3, 3, 3]),
    ],
)
def test_layers_scale_with_the_depth(layers, expected):
    assert [scaled(layer, layers) for layer in (0, 2, 6, 8, 15, 16, 20, 21, 24)] == expected


def test_layers_stay_ascending_in_shallow_decoders():
    assert [stage.layer for stage in solve("sparsevlm", layers=4).stages] == [1, 2, 3]
    assert [stage.layer for stage in solve("dart+random", 0.9, layers=4, horizon=2).stages] == [1, 2]
    assert [stage.layer for stage in solve("dart+random", 0.9, layers=3).stages] == [1, 2]
    with pytest.raises(CodebookError, match="layers 0 to 1"):
        solve("pyramiddrop", 0.9, layers=2)


def test_layers_and_counts_of_the_text_stay():
    schedule = solve("alpha(alpha=0.3)@3+random(seed=2)@9:10; positions=compact", 0.4, n=100, layers=12)
    # 480 - 3 * 100 - 3 * 10 = 6 * 25
    assert str(schedule) == "alpha(alpha=0.3)@3:25, random(seed=2)@9:10; positions=compact"
    assert solve("uniform+random", 0.3, layers=12, horizon=5).stages[1].layer == 5
    # Any schedule is fitted: fractions are shares, here 2 : 1, and 4 tokens stay 4; 12 * 20 = 6 * 24 + 3 * 12 + 3 * 20
    assert str(solve("uniform:1.0, random@6:0.5, random@9:4", 0.2, n=100, layers=12)) == (
        "uniform:30, random@6:15, random@9:4"
    )
    # A scaled count never falls below a later fixed one.
    assert str(solve("uniform:1.0, random@6:20", 20, n=100, layers=12)) == "uniform:20, random@6:20"


@pytest.mark.parametrize(
    "text,keep,options,says",
    [
        ("fastv", 0.05, {}, "out of reach of 'fastv@2:1.0': choose from 0.0642 to 1"),  # (2 * 576 + 30) / 18432
        ("divprune+drop", 0.7, {}, "choose from 0.0012 to 0.6562"),  # 21 / 18432, 21 / 32
        ("vtw", 0.01, {}, "choose from 0.0313 to 0.9687"),
        ("uniform:1.0, random@6:20", 19, {}, "choose from 0.0348"),
        ("uniform", 577, {}, "out of reach"),
        ("uniform", None, {}, "needs a budget"),
        ("uniform:30", 0.5, {}, "no fraction to scale"),
        ("codebook-threshold", 0.5, {}, "cannot be fitted"),
        ("uniform", 0.5, {"horizon": 4}, "horizon and deep are a hybrid's"),
        ("deft", 0.1, {}, "deft, which keeps 0.2 and more until layer 16 of 32: choose from 0.1001 to 1"),
        ("vtw", 0.5, {"deep": 4}, "horizon and deep are a hybrid's"),
        ("uniform+random@4", 0.5, {"horizon": 4}, "leave horizon out"),
        ("uniform+random:4", 0.5, {"deep": 4}, "leave deep out"),
        ("uniform+drop", 0.5, {"deep": 4}, "leave deep out"),
        ("uniform:0.5+random", 0.5, {}, "leave its keep to the budget"),
        ("uniform+random+drop", 0.5, {}, "first[+]second"),
        ("dart+random@1", 0.5, {}, "ascending"),
        ("uniform+random", 0.5, {"horizon": 40}, "layers 0 to 31"),
        ("unifrom+random", 0.5, {}, "did you mean uniform"),
        ("uniform+randm", 0.5, {}, r"part 2, 'randm' \(character 9\).*random"),
        ("pyramidrop", 0.5, {}, "did you mean pyramiddrop"),
        ("pyramiddrop+drop", 0.5, {}, "stands alone"),
        ("pyramiddrop+mass", 0.5, {}, "stands alone"),
        ("uniform+drop+mass", 0.5, {}, "leave mass out"),
    ],
)
def test_refusals(text, keep, options, says):
    with pytest.raises(CodebookError, match=says) as caught:
        solve(text, keep, **options)
    assert "\n" not in str(caught.value)


METHODS_WITH_A_COUNT = [name for name, method in METHODS.items() if name != "drop" and not method.adaptive]
HYBRIDS = [f"{first}+{second}" for first in ("codebook", "dart", "divprune") for second in ("random", "drop")]


@settings(max_examples=300, deadline=None)
@given(
    text=st.sampled_from(METHODS_WITH_A_COUNT + HYBRIDS + ["deft", "feather", "pyramiddrop", "sparsevlm"]),
    keep=st.one_of(st.floats(0.001, 1), st.integers(1, 3000)),
    n=st.integers(2, 3000),
    layers=st.integers(4, 80),
)
def test_a_budget_is_met_or_refused(text, keep, n, layers):
    room = math.floor((keep if isinstance(keep, int) else keep * n) * layers + 1e-6)
    try:
        schedule = solve(text, keep, n, layers)
    except CodebookError as error:
        least, most = map(float, re.search(r"choose from ([\d.e-]+) to ([\d.e-]+)", str(error)).groups())
        # The bounds are rounded inwards to four digits: nothing between may be refused.
        assert room / (n * layers) < least or room / (n * layers) > most
        return
    counts = schedule.counts(n, layers)
    assert sum(counts) <= room
    # One token more in every stage that is neither whole nor dropped would exceed the budget.
    assert sum(counts) == room or sum(counts) + sum(0 < count < n for count in counts) > room
    assert all(before >= after for before, after in pairwise(counts))
    assert schedule == solve(str(schedule), n=n, layers=layers)


@settings(max_examples=100, deadline=None)
@given(keep=st.floats(0.13, 1), n=st.integers(10, 3000), layers=st.integers(4, 80))
def test_the_reserve_of_deft_follows_from_its_last_count(keep, n, layers):
    counts = solve("deft", keep, n, layers).counts(n, layers)
    final = counts[-1]
    # Up to rounding, where the budget has no room for one token more.
    assert abs(counts[0] - (final + math.ceil(0.2 * (n - final)))) <= 2
    assert counts == [counts[0]] * scaled(16, layers) + [final] * (layers - scaled(16, layers))


@settings(max_examples=50, deadline=None)
@given(text=st.sampled_from(sorted(SCHEDULE_PRESETS) + HYBRIDS), n=st.integers(2, 3000), layers=st.integers(4, 80))
def test_a_larger_budget_keeps_no_fewer(text, n, layers):
    before = [0] * layers
    for keep in (0.1, 0.2, 0.3, 0.45, 0.6):
        try:
            counts = solve(text, keep, n, layers).counts(n, layers)
        except CodebookError:
            continue
        assert all(a <= b for a, b in zip(before, counts, strict=True))
        before = counts
