"""Budgets against the figures that the papers print, the text form, and what a schedule refuses."""

import itertools
import json
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codebook.errors import CodebookError
from codebook.pruning import (
    METHODS,
    TOPS,
    Alpha,
    DivPrune,
    Drop,
    FarthestPoint,
    FastV,
    Merged,
    Pruner,
    Random,
    Schedule,
    SeededFarthestPoint,
    Stage,
    Uniform,
    Union,
    Weighted,
    Window,
)

VICUNA = {"layers": 32, "hidden": 4096, "intermediate": 11008}


@dataclass(frozen=True)
class Own(Pruner):
    """A pruner that no name stands for and that decides the number itself."""

    adaptive: ClassVar[bool] = True

    def select(self, tokens, keep):
        return torch.arange(keep)


@pytest.mark.parametrize(
    "stages,average",
    [
        ([(2, 252), (20, 38)], 192.0),  # DART + Random, arXiv 2512.07580
        ([(1, 60), (20, 27)], 63.75),
        ([(0, 284), (20, 38)], 191.75),  # DivPrune + Random
        ([(0, 96), (20, 10)], 63.75),
        ([(2, 260), (21, 0)], 190.375),  # DART + drop all; printed as 190.4
        ([(0, 98), (21, 0)], 64.3125),  # DivPrune + drop all; printed as 64.3
        ([(2, 144)], 171.0),  # FastV at K = 2
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
        ([(8, 275), (16, 24)], 64.2),  # FEATHER
    ],
)
def test_flops_reductions_of_the_feather_paper(stages, reduction):
    schedule = Schedule([Stage(layer, keep, Uniform()) for layer, keep in stages])
    assert 100 * schedule.flops_reduction(729, **VICUNA) == pytest.approx(reduction, abs=0.05)


def test_flops_and_cache_by_hand():
    schedule = Schedule([Stage(1, 2, Uniform())])
    # d = 2, m = 3: 4 and 2 visual tokens, or 5 and 3 with one of text; 4nd^2 + 2n^2d + 2ndm = 28n + 4n^2
    assert schedule.flops(4, layers=2, hidden=2, intermediate=3) == (112 + 64) + (56 + 16)
    assert schedule.flops(4, layers=2, hidden=2, intermediate=3, text=1) == (140 + 100) + (84 + 36)
    assert schedule.flops_reduction(4, layers=2, hidden=2, intermediate=3) == 1 - 248 / 352
    # 6 tokens' keys and values of 2 heads of 5 half-precision numbers
    assert schedule.kv_bytes(4, layers=2, kv_heads=2, head_dim=5) == 6 * 2 * 2 * 5 * 2
    # LLaVA-1.5-7B: half a megabyte a token
    assert Schedule([]).kv_bytes(1, layers=32, kv_heads=32, head_dim=128) == 2**19


def test_counts_per_layer():
    schedule = Schedule([Stage(0, 0.25, Uniform()), Stage(2, 3, Random()), Stage(3, 0, Random())])
    assert schedule.counts(144, 5) == [36, 36, 3, 0, 0]
    assert schedule.budget(144, 4) == (36 + 36 + 3) / (4 * 144)
    assert Schedule([]).budget(144, 4) == 1
    assert Stage(0, 0.001, Uniform()).count(144) == 1  # never nothing, unless asked for
    with pytest.raises(CodebookError, match="keeps 30 visual tokens, but only 14 are left"):
        Schedule([Stage(0, 0.1, Uniform()), Stage(2, 30, Random())]).counts(144, 4)


def test_a_fraction_keeps_the_same_whether_a_stage_says_it_or_a_budget():
    """Never more than it says, in hundredths: whole numbers, so that no rounding of floats is trusted."""
    stages = {k: Stage(0, k / 100, Uniform()) for k in range(1, 101)}
    whole = Schedule([Stage(0, 1.0, Uniform())])
    for n in range(1, 2881):
        assert [stage.count(n) for stage in stages.values()] == [max(1, k * n // 100) for k in stages]
        k = 1 + 37 * n % 100  # each in turn
        if k * n >= 100:  # a budget of less than one token is refused
            assert whole.fit(k / 100, n=n, layers=1 + n % 80).stages[0].keep == k * n // 100
    with pytest.raises(CodebookError, match=r"keep 0\.2 is out of reach"):
        whole.fit(0.2, n=4, layers=32)


def test_adaptive_stages_have_no_count():
    schedule = Schedule([Stage(0, None, Own()), Stage(2, 3, Random())])
    assert schedule.adaptive and not Schedule([]).adaptive
    for ask in (lambda: schedule.counts(9, 4), lambda: schedule.budget(9, 4), lambda: schedule.stages[0].count(9)):
        with pytest.raises(CodebookError, match="known only after running"):
            ask()
    with pytest.raises(CodebookError, match="cannot be fitted"):
        schedule.fit(0.5, n=9, layers=4)
    with pytest.raises(CodebookError, match="say how many tokens Uniform keeps"):
        Stage(0, None, Uniform())
    with pytest.raises(CodebookError, match="leave keep out"):
        Stage(0, 0.5, Own())


@pytest.mark.parametrize(
    "text,stages",
    [
        ("uniform:0.25, random@9:4", [(0, 0.25, Uniform()), (9, 4, Random())]),
        ("fastv@2:1.0, drop@21", [(2, 1.0, FastV()), (21, 0, METHODS["drop"]())]),
        ("fastv(rotated=False)@1:3", [(1, 3, FastV(rotated=False))]),
        ("alpha(alpha=0.3)@3:1e-05, random(seed=7)@4:1", [(3, 1e-5, Alpha(0.3)), (4, 1, Random(7))]),
        ("fastv(query='visual', reverse=True)@3:9", [(3, 9, FastV("visual", reverse=True))]),
        ("uniform:0.25+mass, random@9:4 + mass", [(0, 0.25, Uniform(), True), (9, 4, Random(), True)]),
        (
            "farthest(representatives=2):9, random(seed=7)@2:0.1+mass",
            [(0, 9, FarthestPoint(2)), (2, 0.1, Random(7), True)],
        ),
    ],
)
def test_text_form(text, stages):
    schedule = Schedule([Stage(*stage) for stage in stages])
    assert Schedule.parse(text) == schedule
    assert Schedule.parse(str(schedule)) == schedule
    compact = Schedule(schedule.stages, positions="compact")
    assert Schedule.parse(f"{text};positions = compact") == compact == Schedule.parse(str(compact))


def test_text_of_what_needs_no_options():
    for name in ("random", "fastv-reverse", "fastv-norope", "fastv-vis", "feather-ensemble", "fastv-window"):
        assert str(Schedule([Stage(2, 5, METHODS[name]())])) == f"{name}@2:5"
    assert str(Schedule([])) == "unpruned" and Schedule.parse("unpruned") == Schedule([])
    assert str(Schedule([Stage(0, None, Own())])) == "Own()"


def test_text_with_a_codebook():
    schedule = Schedule.parse("codebook:0.25, random@9:4", "book")
    assert schedule.stages[0].pruner.codebook == "book" and str(schedule) == "codebook:0.25, random@9:4"
    with pytest.raises(CodebookError, match="'codebook' needs a codebook"):
        Schedule.parse("codebook:0.25")


def test_one_codebook_for_all_stages():
    book = object()
    schedule = Schedule.solve("seeded:0.5, codebook@2:0.2, codebook-threshold@3", book, n=576, layers=4)
    assert all(stage.pruner.codebook is book for stage in schedule.stages)


def test_a_seed_for_the_methods_that_draw():
    assert Schedule.parse("random:9, uniform@1:3, random(seed=2)@2:1", seed=7) == Schedule(
        [Stage(0, 9, Random(7)), Stage(1, 3, Uniform()), Stage(2, 1, Random(2))]
    )
    assert [name for name, method in METHODS.items() if method.draws] == ["random"]


def test_what_a_method_needs_is_known_before_its_pruner_is_made():
    needing = [name for name, method in METHODS.items() if method.needs_codebook]
    assert needing == ["codebook", "codebook-farthest", "codebook-middle", "codebook-threshold"]
    for name, method in METHODS.items():
        pruner = method("book") if name in needing else method()
        assert type(pruner) is method.kind
        assert (method.adaptive, method.uses_attention) == (pruner.adaptive, pruner.uses_attention)
        assert all(getattr(pruner, option) == value for option, value in method.options.items())


@pytest.mark.parametrize(
    "text,says",
    [
        ("codebook", "say how many tokens RedundancyCodebook keeps"),
        ("seeded:1.5", "not 1.5"),
        ("seeded(representatives=-1):5", r"part 1, 'seeded\(.*representatives is -1: give 0 or more"),
        ("codebook-threshold:0.5", "leave keep out"),
        ("codebook:0.1, codebook@1:0.5", "come back"),
        ("codebook@2:0.5, seeded@1:0.1", "ascending"),
        ("codebook-threshold; spread=codebook", "leave spread out"),
        ("codebook:0.5; positions=odd", "not 'odd'"),
        ("codebook:0.5", "needs a codebook, which no text holds"),
    ],
)
def test_what_is_wrong_is_said_before_there_is_a_codebook(text, says):
    with pytest.raises(CodebookError, match=says):
        Schedule.parse(text)


def test_pruners_refuse_what_their_text_would():
    for make in (FarthestPoint, lambda count: SeededFarthestPoint("book", count)):
        with pytest.raises(CodebookError, match="representatives is -2: give 0 or more"):
            make(-2)


ODD = (1.5, -1, True, None, "x", "", math.nan, math.inf, (), [4, 4], (4,), (4, 4.0), np.int64(3), np.float32(0.25),
       np.float64("nan"), np.bool_(True), torch.tensor(3), torch.tensor([1.0, 2.0]), np.zeros(3))  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_options_in_python_are_those_of_the_text(name):
    """Whatever is given: refused by both in one line, or taken by both, and the same afterwards."""
    method, book = METHODS[name], ["book"] if METHODS[name].needs_codebook else []
    for option, value in itertools.product(method.options, ODD):
        plain = value.item() if isinstance(value, np.generic) else value
        try:
            method.check(name, {option: plain})
        except CodebookError:
            with pytest.raises(CodebookError, match=option) as caught:
                method(*book, **{option: value})
            assert "\n" not in str(caught.value)
        else:
            pruner = method(*book, **{option: value})
            assert getattr(pruner, option) == plain and "np." not in repr(pruner)


@pytest.mark.parametrize(("make", "says"), [
    (lambda: Window("fastv"), r"Window is made of pruners, objects such as Random\(\), not of 'fastv'"),
    (lambda: Merged(Random), "Merged is made of pruners, .* not of <class"),
    (lambda: Union(Random(), DivPrune()), "DivPrune ranks no tokens, and Union asks for a ranking: use"),
    (lambda: TOPS(relevance=DivPrune()), "DivPrune ranks no tokens, and TOPS asks"),
    (lambda: Weighted([Random(), DivPrune()], [1, 1]), "DivPrune ranks no tokens, and Weighted asks"),
    (lambda: Weighted([Random()], ["1"]), r"the weights of Weighted are \['1'\]: give numbers, each finite"),
    (lambda: Weighted([Random()], [math.nan]), "give numbers, each finite"),
])  # fmt: skip
def test_methods_are_made_of_pruners_that_can_do_what_is_asked(make, says):
    with pytest.raises(CodebookError, match=says):
        make()


def test_schedules_print_as_their_text():
    schedule = Schedule.parse("uniform:0.25+mass, drop@3; quotas=shared")
    assert repr(schedule) == (
        "<Schedule 'uniform:0.25+mass, drop@3; quotas=shared': keeps 25% of an image's visual tokens before the LLM, "
        "none from layer 3 on; kept tokens stand for dropped ones>"
    )
    assert repr(Schedule([])) == "<Schedule 'unpruned': keeps all visual tokens>"
    assert repr(Schedule.parse("random@2:9")) == (
        "<Schedule 'random@2:9': keeps 9 of an image's visual tokens from layer 2 on>"
    )
    assert list(map(repr, schedule.stages)) == ["Stage('uniform:0.25+mass')", "Stage('drop@3')"]


def test_a_name_for_a_method_with_mass():
    schedule = Schedule.parse("seeded(representatives=2):0.25, random@9:4", "book")
    assert schedule.stages[0] == Stage(0, 0.25, SeededFarthestPoint("book", 2), mass=True)
    assert not schedule.stages[1].mass
    assert str(schedule) == "codebook-farthest(representatives=2):0.25+mass, random@9:4"
    assert Schedule.parse("seeded@3:9+mass", "book") == Schedule.parse("codebook-farthest@3:9+mass", "book")


@pytest.mark.parametrize("factory", METHODS.values(), ids=list(METHODS))
def test_every_method_round_trips(factory):
    adaptive = getattr(factory, "adaptive", False)
    name = next(name for name, value in METHODS.items() if value is factory)

    at = "" if factory.before_llm else "@3"
    text = name + at if adaptive or name == "drop" else f"{name}{at}:0.5"
    assert str(Schedule.parse(text, "book")) == text
    if name != "drop":
        assert str(Schedule.parse(text + "+mass", "book")) == text + "+mass"


@pytest.mark.parametrize(
    "text,says",
    [
        ("codebok:0.2", r"part 1, 'codebok:0.2' \(character 1\): no method 'codebok': did you mean codebook"),
        ("uniform:0.5,random@x:0.1", r"part 2, 'random@x:0.1' \(character 13\): the layer 'x'"),
        ("uniform:0.5, magic:2", "no method 'magic': `codebook list` names all$"),
        ("uniform", "say how many tokens Uniform keeps"),
        ("", "write method"),
        ("uniform:0.5,", "part 2, '' .character 13.: write method"),
        ("uniform:1.5", "not 1.5"),
        ("uniform:0", "not 0"),
        ("uniform:a", "keep 'a' is not a number"),
        ("uniform:nan", "keep must be"),
        ("fastv:0.5", "at layer 1 or later"),
        ("uniform@3:0.5,random@1:0.1", "ascending"),
        ("uniform:0.1,random@1:0.5", "come back"),
        ("drop@3,random@5:1", "nothing is left for the stage at layer 5"),
        ("drop", "drop needs a layer"),
        ("drop@3:5", "keeps nothing"),
        ("drop@3+mass", "leave mass out"),
        ("uniform+mass:5", "no method 'uniform[+]mass'"),
        ("uniform:5+mas", "keep '5[+]mas' is not a number"),
        ("seded:5", "did you mean seeded"),
        ("random(sed=3):5", "no option 'sed': did you mean seed. its options are seed"),
        ("random(seed='x'):5", "must be like 0, not 'x'"),
        ("random(3):5", "cannot read the options"),
        ("random(seed=f()):5", "cannot read the options"),
        ("pool(a=1):5", "no option 'a': it has none"),
        ("uniform:5; colour=red", r"'colour=red' \(character 11\)"),
        ("uniform:5; positions=shuffled", "shuffled"),
        ("pyramiddrop", "Schedule.solve"),
    ],
)
def test_text_errors_name_the_part(text, says):
    with pytest.raises(CodebookError, match=says) as caught:
        Schedule.parse(text)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="uniformrads@:(,)=;+.0123 '", max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        schedule = Schedule.parse(text)
    except CodebookError:
        return
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize("keep", [0, 0.0, -1, 1.5, math.nan, math.inf, True, False])
def test_impossible_budgets(keep):
    with pytest.raises(CodebookError, match="keep must be"):
        Stage(0, keep, Uniform())
    with pytest.raises(CodebookError, match="keep must be"):
        Schedule([Stage(0, 1.0, Uniform())]).fit(keep, n=9, layers=4)


def test_dropping_all_is_for_later_layers():
    assert Stage(1, 0, Uniform()).count(9) == 0
    for keep in (0.0, False, -1):
        with pytest.raises(CodebookError, match="keep must be"):
            Stage(1, keep, Uniform())


def test_counts_larger_than_the_image():
    with pytest.raises(CodebookError, match="lower the count"):
        Schedule([Stage(0, 200, Uniform())]).counts(144, 4)


def test_files(tmp_path):
    schedule = Schedule([Stage(0, 62, Uniform(), mass=True), Stage(6, 10, Random(3))], positions="compact")
    schedule.save(tmp_path / "schedule.json")
    record = {"format": 1, "schedule": "uniform:62+mass, random(seed=3)@6:10; positions=compact"}
    assert json.loads((tmp_path / "schedule.json").read_text()) == record
    assert Schedule.load(tmp_path / "schedule.json") == schedule
    with pytest.raises(CodebookError, match="no text form"):
        Schedule([Stage(0, None, Own())]).save(tmp_path / "own.json")
    assert not (tmp_path / "own.json").exists()


@pytest.mark.parametrize(
    "content,says",
    [
        (None, "cannot read schedule"),
        (b"\xff\xfe", "cannot read schedule"),
        (b"[]", "is no schedule"),
        (b'{"format": 1}', "is no schedule"),
        (b'{"format": 2, "schedule": "uniform:3"}', "format 2; this version reads format 1"),
        (b'{"format": 1, "schedule": 3}', "is no schedule"),
        (b'{"format": 1, "schedule": "magic:3"}', "magic"),
    ],
)
def test_unreadable_files(tmp_path, content, says):
    path = tmp_path / "schedule.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CodebookError, match=says):
        Schedule.load(path)


def test_counts_become_shares_that_give_them():
    for n in (144, 576, 729):
        for count in range(1, n + 1):
            [stage] = Schedule([Stage(0, count, Uniform())]).shares(n).stages
            assert stage.count(n) == count and len(str(stage.keep)) <= 5
    shared = Schedule([Stage(0, 24, Uniform()), Stage(2, 0.01, Uniform()), Stage(4, 0, Drop())], "compact").shares(576)
    # the shortest: 0.042 * 576 = 24.19
    assert str(shared) == "uniform:0.042, uniform@2:0.01, drop@4; positions=compact"


def test_costs_of_a_hybrid_decoder():
    """Two of four layers have attention: worked by hand for 10 and 4 tokens, d = 2, m = 3."""
    schedule = Schedule([Stage(2, 4, Uniform())])
    size = {"layers": 4, "attending": {0, 2}}
    assert schedule.kv_bytes(10, kv_heads=1, head_dim=8, **size) == 2 * 8 * 2 * (10 + 4)
    per_token = 4 * 2**2 + 2 * 2 * 3
    whole = per_token * (10 + 10 + 4 + 4) + 2 * 2 * (10**2 + 4**2)
    assert schedule.flops(10, hidden=2, intermediate=3, **size) == whole
