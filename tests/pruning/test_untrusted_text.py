"""Texts and files of schedules as strangers write them: a schedule or one line, and within a second."""

import json
import math
import os
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codebook.errors import CodebookError
from codebook.pruning import METHODS, Schedule
from codebook.pruning.plan import Plan
from codebook.pruning.presets import SCHEDULE_PRESETS
from codebook.pruning.text import LONGEST_TEXT
from codebook.store.codebook import Codebook

BOOK = Codebook(torch.eye(4), None, {"spread": 0.3})
BLANKS = " " * 3000


def outcome(make):
    """A schedule, or the message of the one error that users are meant to read; at most a second of work for either."""
    start = time.process_time()
    try:
        found = make()
    except CodebookError as error:
        found = str(error)
        assert found and len(found.splitlines()) == 1 and len(found) <= 700
    assert time.process_time() - start < 1
    return found


def read(text):
    """What every entrance says about a text; they agree on whether it is one."""
    solved = outcome(lambda: Schedule.solve(text, BOOK, n=144, layers=12, keep=0.3))
    assert isinstance(solved, Schedule | str)
    outcome(lambda: Plan(text).schedule)
    return outcome(lambda: Schedule.parse(text, BOOK))


@pytest.mark.parametrize(
    "text,says",
    [
        (f"uniform{BLANKS}x:5", "no method 'uniform "),
        (f"uniform{BLANKS}", "say how many tokens"),
        (f"uniform@2{BLANKS}3:0.5", "the layer '2 "),
        (f"uniform:{BLANKS}nought", "keep 'nought' is not a number"),
        (f"uniform:5{BLANKS}+{BLANKS}mass{BLANKS}x", "keep '5 "),
        (f"uniform:5{BLANKS}+{BLANKS}mas", "keep '5 "),
        (f"uniform(a=1){BLANKS}x", "write method"),
        (f"uniform:5;{BLANKS}spread{BLANKS}={BLANKS}x", "cannot read the spread 'x'"),
        (BLANKS, "write method"),
        (BLANKS * 4, f"the schedule's text has 12000 characters: write at most {LONGEST_TEXT}"),
        ("x" * LONGEST_TEXT, "no method 'xxxx"),
        ("+" * 9000, "no method|write method"),
        ("," * 9000, r"part 1, '' .character 1.: write method"),
        (";" * 9000, "cannot read ''"),
        ("(" * 9000, "write method"),
        (")" * 9000, "write method"),
        ("uniform" + "(" * 4000 + ")" * 4000, "cannot read the options"),
        ("fastv(query=" + "(" * 4000 + "1" + ")" * 4000 + ")@2:5", "cannot read the options"),
        ("random(seed=" + "-" * 9000 + "1):5", "cannot read the options"),
        ("random(seed=" + "[" * 150 + "]" * 150 + "):5", "must be like 0"),
        ("random(seed=1" + "+1" * 4000 + "):5", "cannot read the options"),
        ("random(seed=" + "9" * 9000 + "):5", "cannot read the options"),
        ("random(seed=" + "9" * 400 + "):5", r"seed is 999\d+\.\.\.9: give"),
        ("random(seed=True):5", "must be like 0, not True"),
        ("random(seed=1, seed=2):5", "give each option once"),
        ("random(**{'seed': 1}):5", "give each option once, as option=value"),
        ("alpha(alpha=0.3)(alpha=0.4)@2:5", "cannot read the options"),
        ("alpha(alpha=0.3).x(alpha=0.4)@2:5", "cannot read the options"),
        ("alpha(alpha=1e999)@2:5", "must be like 0.5, not inf"),
        ("alpha(alpha=1.5)@2:5", "alpha is 1.5: give 0 to 1"),
        ("alpha(alpha=-1)@2:5", "alpha is -1: give 0 to 1"),
        ("fastv(query='nothing')@2:5", "query is 'nothing': give 'text' or 'question' or 'visual'"),
        (r"fastv(query='te\xt')@2:5", "cannot read the options"),
        ("codebook(scoring='soft'):5", "scoring is 'soft': give 'max' or 'double_softmax'"),
        ("codebook-threshold(threshold=3)", "threshold is 3: give -1 to 1"),
        ("fastv-window(windows=(4,))@2:5", r"must be like \(4, 4\), not \(4,\)"),
        ("fastv-window(windows=('a', 'b'))@2:5", r"must be like \(4, 4\)"),
        ("fastv-window(windows=(0, 4))@2:5", "give 1 to"),
        ("fastv-window(pruner=1)@2:5", "no option 'pruner': its options are windows"),
        ("dart(image_pivots=0)@2:5", "image_pivots is 0: give 1 or more"),
        ("phi-knn(neighbours=0):5", "neighbours is 0: give 1 or more"),
        (f"{'a' * 500}(b=1):5", "no method 'aaaa"),
        (f"random({'b' * 500}=1):5", "no option 'bbb.*its options are seed"),
        (f"random:5; {'c' * 500}=1", "cannot read 'ccc"),
        (f"random:5; positions={'d' * 500}", "positions must be 'keep' or 'compact', not 'ddd"),
        ("random:5; quotas=each; quotas=shared", "says quotas twice"),
        ("random:" + "9" * 5000, "keep '9+...' is too large: write at most 9 digits"),
        ("random:9999999999", "is too large"),
        ("random@" + "9" * 5000 + ":5", "layer '9+...' is too large"),
        ("random@-1:5", "'-1' is not a whole number"),
        ("random@1.0:5", "'1.0' is not a whole number"),
        ("random@٣:5", "the layer '٣' is not a whole number"),
        ("random:٣", "keep '٣' is not a number"),
        ("random:²", "keep '²' is not a number"),
        ("random:0.٣", "is not a number"),
        ("random:1_0", "keep '1_0' is not a number"),
        ("random:0x10", "keep '0x10' is not a number"),
        ("random:inf", "keep must be"),
        ("random:-0.5", "keep must be"),
        ("random:1e-400", "keep must be"),
        ("random:0.5; spread=inf", "spread must be a number above 0"),
        ("random:0.5; spread=1_0", "cannot read the spread"),
        ("random:0.5; spread=-0.0", "spread must be a number above 0"),
        ("random\0:5", r"no method 'random\\x00'"),
        ("random(seed='\0'):5", "cannot read the options"),
        ("random(seed='\ud800'):5", "cannot read the options"),
        ("ran\ndom:5", r"no method 'ran\\ndom'"),
        ("random:5\u2028", "keep|Schedule"),
        ("random(seed=1#\n):5", "cannot read the options|Schedule"),
        (b"random:5", "a schedule's text is a string"),
        (None, "a schedule's text is a string"),
    ],
)
def test_odd_texts_are_refused_by_name(text, says):
    if isinstance(text, str):
        found = read(text)
    else:
        found = outcome(lambda: Schedule.parse(text))
        assert outcome(lambda: Schedule.solve(text, n=9, layers=4)) == found
    with pytest.raises(CodebookError, match=says):
        raise CodebookError(repr(found) if isinstance(found, Schedule) else found)


@pytest.mark.parametrize("text", ["uniform:1e-7", "uniform:1e-300", "uniform:1.0, random@2:1e-300, drop@3"])
def test_shares_too_small_to_scale(text):
    assert str(Schedule.parse(text)) == text.replace("1e-7", "1e-07")
    with pytest.raises(CodebookError, match=r"too small to scale: write 0\.000001 or more"):
        Schedule.solve(text, n=576, layers=32, keep=0.2)
    assert Schedule.solve("uniform:1.0, random@2:1e-6", n=576, layers=32, keep=0.2).budget(576, 32) <= 0.2


def test_the_longest_texts_are_read():
    stages = ", ".join(f"fastv(rotated=False, image_only=True)@{layer}:0.5" for layer in range(1, 81))
    assert len(stages) < LONGEST_TEXT and len(read(stages).stages) == 80
    blanks = Schedule.parse(f"uniform{BLANKS}@{BLANKS}2 : 5 + mass")
    assert str(blanks) == "uniform@2:5+mass"


SIGNS = ["(", ")", "()", "=", "@", ":", "+", ",", ";", " ", "\n", "'", "-", "{}", "**", "#", "\\", "[" * 300, " " * 500]
WORDS = [
    "seeded",
    "restore",
    "unpruned",
    "mass",
    "distance",
    "keep",
    "compact",
    "shared",
    "codebook",
    "None",
    "True",
    "(4, 4)",
    "'visual'",
]
KEYS = ["positions", "quotas", "spread", "alpha", "seed", "windows", "query", "threshold", "representatives"]
NUMBERS = ["0", "1", "2", "0.5", "1e-7", "1e-300", "1.0", "1e9", "1e999", "nan", "9" * 20, "9" * 5000]
STRANGE = ["\0", "٣", "²", "\ud800", "\u2028", "\ufeff"]
PIECES = st.sampled_from(
    [*METHODS, *SCHEDULE_PRESETS, *SIGNS, *WORDS, *(f"{key}=" for key in KEYS), *NUMBERS, *STRANGE]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(PIECES, max_size=12).map("".join), st.text(max_size=40)))
def test_any_text_is_a_schedule_or_one_line(text):
    found = read(text)
    if isinstance(found, Schedule):
        assert Schedule.parse(str(found), BOOK) == found
        assert all(stage.keep is None or math.isfinite(stage.keep) for stage in found.stages)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_option_has_bounds_or_a_type_that_bounds_it(method):
    """No number that a text can hold reaches a pruner that cannot take it."""
    for name, default in METHODS[method].options.items():
        for value in ("1e999", "-1e999", "10**9", "9" * 400, "-" + "9" * 400, "'x'", "None", "()", "[1]", "{}"):
            found = outcome(lambda value=value, name=name: Schedule.parse(f"{method}({name}={value})@2:0.5", BOOK))
            if isinstance(default, int) and not isinstance(default, bool) and value == "9" * 400:
                continue  # as many as there are
            assert isinstance(found, str), f"{method}({name}={value})"


GOOD = {"format": 1, "schedule": "uniform:0.5"}


@pytest.mark.parametrize(
    "content,says",
    [
        (b"", "cannot read schedule"),
        (b"{", "cannot read schedule"),
        (b'"uniform:3"', "is no schedule"),
        (b"null", "is no schedule"),
        (b"1e999", "cannot read schedule.*1e999 is no finite number"),
        (b"NaN", "cannot read schedule.*NaN is no finite number"),
        (json.dumps(GOOD | {"format": "1"}).encode(), "is no schedule"),
        (json.dumps(GOOD | {"format": 1.5}).encode(), "is no schedule"),
        (json.dumps(GOOD | {"format": True}).encode(), "is no schedule"),
        (json.dumps(GOOD | {"format": None}).encode(), "is no schedule"),
        (json.dumps(GOOD | {"format": 10**400}).encode(), "schedule format 1000|is no schedule"),
        (json.dumps(GOOD | {"schedule": None}).encode(), "is no schedule"),
        (json.dumps(GOOD | {"schedule": ["uniform:0.5"]}).encode(), "is no schedule"),
        (json.dumps(GOOD | {"schedule": {"uniform": 0.5}}).encode(), "is no schedule"),
        (json.dumps(GOOD | {"schedule": "x" * 20_000}).encode(), "20000 characters"),
        (json.dumps(GOOD | {"schedule": "uniform:\ud800"}).encode(), "cannot read schedule"),
        (json.dumps([GOOD]).encode(), "is no schedule"),
        (b'{"format": 1, "schedule": "uniform:0.5", "more": ' + b"9" * 5000 + b"}", "cannot read schedule"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"[" * 5000 + b"]" * 5000, "cannot read schedule"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "cannot read schedule"),
        (b'{"format": 1, "schedule": "uniform:0.5', "cannot read schedule"),
        (json.dumps(GOOD).encode("utf-16"), "cannot read schedule"),
        (b'{"format": 1, "schedule": "\xff"}', "cannot read schedule"),
    ],
)
def test_odd_files_are_refused_by_name(tmp_path, content, says):
    path = tmp_path / "schedule.json"
    path.write_bytes(content)
    for make in (lambda: Schedule.load(path), lambda: Plan(str(path))):
        found = outcome(make)
        assert isinstance(found, str)
        with pytest.raises(CodebookError, match=says):
            raise CodebookError(found)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a file of another system")
def test_what_is_no_plain_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe", "zero", "folder"):
        path = tmp_path / f"{name}.json"
        for make in (lambda path=path: Schedule.load(path), lambda path=path: Plan(str(path))):
            assert outcome(make).startswith(f"{path} is not a regular file")


def test_files_that_are_too_large_are_not_read(tmp_path):
    path = tmp_path / "schedule.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # of nothing: it takes no room
    assert outcome(lambda: Schedule.load(path)).startswith(f"{path} has 1,099,511,627,776 bytes: at most 1,048,576 are")


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_bytes(json.dumps(GOOD).encode("utf-8-sig"))
    assert Schedule.load(path) == Schedule.parse("uniform:0.5") == Schedule.parse(Plan(str(path)).schedule)


def test_places_that_are_no_files(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path / ("x" * 5000), tmp_path / "a" / "b.json"):
        assert outcome(lambda path=path: Schedule.load(path)).startswith("cannot read schedule")
    schedule = Schedule.parse("uniform:0.5")
    for path in (tmp_path / "no" / "folder.json", tmp_path, tmp_path / ("x" * 5000)):
        assert outcome(lambda path=path: schedule.save(path))
    assert not list(tmp_path.iterdir())


def test_files_may_hold_more(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(GOOD | {"calibration": {"gain": 0.1}}))
    assert Schedule.load(path) == Schedule.parse("uniform:0.5")
