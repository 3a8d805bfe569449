"""The benchmark end to end on the miniature: what is measured, what is not repeated, what the report holds."""

import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from codebook import CodebookError, Random, Schedule, Stage, Uniform, load, prebuilt
from codebook.cli.data import load_data
from codebook.evaluation import bench, charts, costs, latency, report
from codebook.evaluation.looks import samples_to_show, show_rows
from codebook.evaluation.metrics import Task
from codebook.evaluation.rows import plan, row_of
from codebook.evaluation.timing import quartiles
from codebook.inference import respond
from codebook.inference.ask import ask
from codebook.pruning import METHODS, FastV
from codebook.store.horizons import read_horizon
from tests.journals import read_journal
from tests.prompts import prompt
from tests.pruning.stages import MODELS, schedule
from tests.serving.browser import CHROMIUM, Browser

KEEPS = [0.25, 0.05]
CHOSEN = ["codebook", "fastv", "uniform"]


@pytest.fixture(scope="module")
def loaded():
    model, processor = load("miniature", "cpu")
    book = prebuilt(model)
    rows, skipped = plan(model, CHOSEN, KEEPS, book, [3, 4])
    tasks = [task for task in load_data(["miniature"], 4) if task.name in ("exist", "ocr")]
    return model, processor, tasks, rows, skipped


SETTINGS = bench.BenchSettings(seconds=0, against="uniform")


@pytest.fixture(scope="module")
def measured(loaded, tmp_path_factory):
    """Results, what is shown, and the folder; the run was stopped half-way, and went on."""
    model, processor, tasks, rows, skipped = loaded
    folder = tmp_path_factory.mktemp("bench")

    def stop(count, note):
        if count >= bench.count_answers(tasks, rows) // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.measure(model, processor, tasks, rows, folder, SETTINGS, stop)
    _, before = read_journal(folder / "answers.sqlite")
    results = bench.measure(model, processor, tasks, rows, folder, SETTINGS)
    _, after = read_journal(folder / "answers.sqlite")
    assert list(after.items())[: len(before)] == list(before.items())  # nothing of the first half was done again
    assert 0 < len(before) < len(after) == 2 * sum(len(row.schedules) for row in rows)
    samples = samples_to_show(tasks, 2)
    looks = show_rows(model, processor, samples, rows, folder / "samples.sqlite")
    whole = {"name": "miniature", "data": ["miniature"], "keeps": KEEPS, **results, "samples": looks}
    return json.loads(json.dumps(whole | {"skipped": skipped + whole["skipped"]})), samples, folder


def test_parts_make_the_whole(loaded, measured, tmp_path, monkeypatch):
    """Two parts, one of which was stopped, answer each question once; the run then has only to time."""
    model, processor, tasks, rows, _ = loaded
    settings = bench.BenchSettings(batch=2, seconds=0)
    totals = [bench.count_answers(tasks, rows, settings, part) for part in ((1, 3), (2, 3), (3, 3))]
    assert sum(totals) == bench.count_answers(tasks, rows) and totals[0] == 2 * totals[1] == 2 * totals[2]

    def stop(count, note):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.measure(model, processor, tasks, rows, tmp_path, settings, stop, (1, 2))
    heard = []
    for part in ((1, 2), (2, 2)):
        bench.measure(model, processor, tasks, rows, tmp_path, settings, lambda n, note: heard.append(n), part)
        assert heard[-1] == bench.count_answers(tasks, rows, settings, part)
    files = [tmp_path / f"answers-{i}-of-2.sqlite" for i in (1, 2)]
    names = [name for file in files for name in read_journal(file)[1]]
    assert len(set(names)) == len(names) == 4 * sum(len(row.schedules) for row in rows)
    monkeypatch.setattr("codebook.inference.respond.answer_prompts", None)  # nothing is left to answer
    results = bench.measure(model, processor, tasks, rows, tmp_path, settings)
    for ours, theirs in zip(results["rows"], measured[0]["rows"], strict=True):
        assert (ours["tasks"], ours["kept"]) == (theirs["tasks"], theirs["kept"])


def test_a_method_that_is_spelt_two_ways_is_one_row(loaded):
    spelt = ["seeded", "codebook-farthest+mass", "fastv(query='text', own_layer=False)@2", "fastv(own_layer=False)@2"]
    spelt += ["uniform(phase='centre')", "seeded; positions=keep", "seeded+random@5:.5", "seeded + random@5:0.50"]
    rows, skipped = plan(loaded[0], spelt, [0.25])
    assert [row.method for row in rows] == ["unpruned", spelt[0], spelt[2], spelt[6], "random", "uniform", "downsample"]
    assert {one["method"]: one["reason"].partition(": ")[0] for one in skipped} == {
        spelt[1]: "it is the same as seeded", spelt[3]: f"it is the same as {spelt[2]}",
        spelt[4]: "it is the same as uniform", spelt[5]: "it is the same as seeded",
        spelt[7]: f"it is the same as {spelt[6]}",
    }  # fmt: skip


def test_a_baseline_that_is_spelt_another_way_is_still_the_gate(loaded, tmp_path):
    model, processor, tasks, _, _ = loaded
    rows, skipped = plan(model, ["random@0", "downsample@0", "codebook"], [0.25])
    assert [row.method for row in rows] == ["unpruned", "codebook", "random", "uniform", "downsample"]
    assert [one["method"] for one in skipped] == ["random@0", "downsample@0"]
    few = [replace(task, samples=task.samples[:1]) for task in tasks]
    results = bench.measure(model, processor, few, rows[:3] + rows[4:], tmp_path, bench.BenchSettings(seconds=0))
    assert set(results["rows"][1]["gates"]) == {"random", "downsample"} and "group_a" in results["rows"][1]


def test_rows_that_are_not_at_the_budget_are_named(measured):
    results = json.loads(json.dumps(measured[0]))
    assert "Not at this budget" not in report.markdown(results)
    [row] = [row for row in results["rows"] if (row["method"], row["keep"]) == ("downsample", 0.25)]
    row["kept"]["average"] = 0.2394  # 0.0106 below
    text, words = (
        report.markdown(results),
        "Not at this budget, on average over questions and layers: downsample (23.9%).",
    )
    assert text.count("Not at this budget") == 1 and words in text and words in report.html(results | {"samples": []})


def test_rows_are_all_methods_and_baselines_at_all_budgets(loaded):
    _, _, _, rows, skipped = loaded
    assert [row.name for row in rows] == [
        "unpruned", "codebook 0.25", "fastv 0.25", "uniform 0.25", "random 0.25", "downsample 0.25",
        "codebook 0.05", "uniform 0.05", "random 0.05", "downsample 0.05",
    ]  # fmt: skip
    [one] = skipped
    assert (one["method"], one["keep"]) == ("fastv", 0.05) and "out of reach" in one["reason"]
    assert [s.stages[0].pruner for s in rows[4].schedules] == [Random(3), Random(4)]
    assert rows[-1].schedules[0].counts(144, 12) == [7] * 12  # 0.05 of 144
    assert row_of(loaded[0], "downsample", 0.12, None, [0]).schedules[0].counts(144, 12) == [16] * 12  # not 17


def test_a_schedule_of_counts_is_measured_at_its_own_budget(loaded):
    text = "uniform:36, random@6:10"  # 6 * (36 + 10) of 12 * 144: 0.16
    found = row_of(loaded[0], text, 0.16, None, [0])
    assert found.schedules[0].counts(144, 12) == [36] * 6 + [10] * 6
    with pytest.raises(CodebookError, match=r"a budget of 0\.160: give that"):
        row_of(loaded[0], text, 0.25, None, [0])
    assert row_of(loaded[0], "vtw", 0.25, None, [0]).schedules[0].counts(144, 12) == [144] * 3 + [0] * 9


def test_a_run_that_was_stopped_has_the_numbers_of_one_that_was_not(loaded, measured, tmp_path):
    model, processor, tasks, rows, _ = loaded
    whole = bench.measure(model, processor, tasks, rows, tmp_path, SETTINGS)
    for ours, theirs in zip(measured[0]["rows"], json.loads(json.dumps(whole))["rows"], strict=True):
        assert all(ours[key] == theirs[key] for key in ("schedule", "kept", "tasks", "mean"))
    # Again: nothing is answered, timed or written anew.
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = bench.measure(model, processor, tasks, rows, tmp_path, SETTINGS)
    assert again == whole and files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_scores_are_those_of_asking_one_way_after_the_other(loaded, measured):
    from codebook.evaluation import evaluate

    model, processor, tasks, rows, _ = loaded
    samples = [sample for task in tasks for sample in task.samples]
    for i in (0, 1):
        own = evaluate(model, processor, samples, rows[i].schedules[0])
        found = {task: one["score"] for task, one in measured[0]["rows"][i]["tasks"].items()}
        assert found == pytest.approx({task: np.mean(scores.values) for task, scores in own.items()})
    row = measured[0]["rows"][4]
    assert row["seeds"] == 2 and "spread" in row["mean"]


def test_rows_are_compared_with_the_one_asked_for_on_the_same_questions(loaded, measured):
    from codebook.evaluation import evaluate

    model, processor, tasks, rows, _ = loaded
    samples = [sample for task in tasks for sample in task.samples]
    ours, theirs = (evaluate(model, processor, samples, rows[i].schedules[0]) for i in (1, 3))  # codebook, uniform
    apart = {task: np.subtract(ours[task].values, theirs[task].values) for task in ours}
    assert any(own.any() for own in apart.values())
    found = measured[0]["rows"][1]["against"]
    assert {t: one["change"] for t, one in found["tasks"].items()} == pytest.approx(
        {t: own.mean() for t, own in apart.items()}
    )
    errors = [own.std(ddof=1) / len(own) ** 0.5 for own in apart.values()]
    mean, half = np.mean([own.mean() for own in apart.values()]), 1.96 * np.hypot(*errors) / 2
    assert found["change"] == pytest.approx(mean) and found["change_interval"] == pytest.approx(
        [mean - half, mean + half], abs=1e-6
    )
    alone = {(row["method"], row["keep"]) for row in measured[0]["rows"] if "against" not in row}
    assert alone == {("unpruned", 1.0), ("uniform", 0.25), ("uniform", 0.05)}


def test_costs(loaded, measured):
    rows = {(row["method"], row["keep"]): row for row in measured[0]["rows"]}
    full, flat, late = rows["unpruned", 1.0], rows["uniform", 0.25], rows["fastv", 0.25]
    assert full["kept"] == {"average": 1.0, "layers": [144.0] * 12} and full["mean"]["change"] == 0
    assert flat["kept"] == {"average": 0.25, "layers": [36.0] * 12}
    assert late["kept"]["layers"] == [144.0] + [26.0] * 11  # 12 * 36 = 144 + 11 * 26 + 2
    text = measured[0]["timed"]["prompt"] - 144
    shape = {"layers": 12, "hidden": 160, "intermediate": 432, "text": text}
    assert full["cost"]["flops"] == Schedule([]).flops(144, **shape)
    assert late["cost"]["flops"] == Schedule([Stage(1, 26, Uniform())]).flops(144, **shape)
    stored = [144 + text] + [26 + text] * 11
    assert late["cost"]["kv_cache"] == sum(stored) * 2 * 160 * 4  # keys and values, 160 wide, fp32
    assert flat["cost"]["peak_memory"] < full["cost"]["peak_memory"]
    for row in rows.values():
        cost = row["cost"]
        assert cost["first_token"]["rounds"] == costs.ROUNDS[0] and cost["vision"]["median"] > 0
        assert 0 < cost["prefill"]["q1"] <= cost["prefill"]["median"] <= cost["prefill"]["q3"]
        assert (cost["selector"]["median"] > 0) == (row["method"] != "unpruned")
    assert full["cost"]["speedup"]["median"] == 1


def test_times_are_of_the_innermost_phase(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: float(next(now)))
    clock = latency.Clock(torch.device("cpu"))
    # prefill from 0, selector from 1, vision from 2 to 3, selector to 4, prefill to 5
    with clock.phase("prefill"), clock.phase("selector"), clock.phase("vision"):
        pass
    assert clock.seconds == {"prefill": 2, "selector": 2, "vision": 1}


def test_peak_memory_counts_what_is_alive_at_once():
    def work():
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a
        c = torch.zeros(500)
        c.view(5, 100).add_(1)  # no memory of its own: 6000
        return b

    assert latency.peak_bytes(torch.device("cpu"), work) == 8000


FILM = prompt(MODELS["clip", "sdpa"], [[7, "image", "image", "image", 8, 9]])
OTHERS = {
    "own layer": Schedule([Stage(2, 9, FastV(own_layer=True))]),
    "groups": Schedule([Stage(0, 9, METHODS["divprune-merged"](), mass=True), Stage(2, 4, Uniform(), mass=True)]),
}


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_what_is_timed_is_what_runs(name):
    """Every method, also of frames, of its own layer and with groups of its own: the same tokens and logits."""
    if name in OTHERS:
        plan = OTHERS[name]
    else:  # of three frames EVS keeps the first whole
        plan = Schedule([Stage(0, 0.5, METHODS[name]())]) if METHODS[name].joint else schedule(name, "clip")
    one = latency.TimedPrompt(MODELS["clip", "sdpa"], lambda size: FILM, FILM)
    clock, options = latency.Clock(torch.device("cpu")), {"return_dict_in_generate": True, "output_logits": True}
    plain, pruning = one.generate(plan, 2, **options)
    timed, same = one.generate(plan, 2, clock, **options)
    assert [[own.tolist() for own in stages] for stages in pruning.kept] == [
        [own.tolist() for own in stages] for stages in same.kept
    ]
    assert all(map(torch.equal, plain.logits, timed.logits))
    assert clock.seconds["vision"] > 0 and clock.seconds["prefill"] > 0 and clock.seconds["selector"] > 0


def test_choosing_and_merging_are_the_selectors_time():
    class Slow(Uniform):
        def select(self, tokens, keep):
            time.sleep(0.01)
            return super().select(tokens, keep)

        def merge(self, tokens, index):
            time.sleep(0.02)
            return tokens.hidden[index]

    one, clock = (
        latency.TimedPrompt(MODELS["clip", "sdpa"], lambda size: FILM, FILM),
        latency.Clock(torch.device("cpu")),
    )
    _, pruning = one.generate(Schedule([Stage(1, 9, Slow())]), 1)
    one.generate(Schedule([Stage(1, 9, Slow())]), 1, clock)
    assert clock.seconds["selector"] >= 3 * 0.03  # three images
    assert pruning.statistics.selector_seconds >= 3 * 0.03


def test_films_are_timed_as_films(tmp_path):
    """A method of frames below a budget of 1, of which a single frame would be too little."""
    model, processor = load("miniature", "cpu")
    rows, _ = plan(model, ["evs"], [0.5])
    results = bench.measure(model, processor, load_data(["miniature:video"], 1), rows[:2], tmp_path, SETTINGS)
    assert [row["method"] for row in results["rows"]] == ["unpruned", "evs"] and not results["skipped"]
    assert results["rows"][1]["cost"]["selector"]["median"] > 0


def test_what_cannot_be_timed_or_answered_is_left_out_and_the_others_are_not(loaded, tmp_path, monkeypatch):
    model, processor, tasks, rows, _ = loaded
    unpruned, late, flat, settings = rows[0], rows[2], rows[3], bench.BenchSettings(seconds=0, batch=2)
    seen = []

    def refuse(self, tokens, keep, *, own=Uniform.select):
        seen.append(keep)
        if len(seen) in refusals:
            raise CodebookError("no such picture")
        return own(self, tokens, keep)

    monkeypatch.setattr(Uniform, "select", refuse)
    # The first choice is the trial, and those of the eight questions follow, two a batch.
    for refusals, answered in (({1}, 0), ({4}, 1)):
        seen.clear()
        folder = tmp_path / str(min(refusals))
        results = bench.measure(model, processor, tasks, [unpruned, flat, late], folder, settings)
        assert [row["method"] for row in results["rows"]] == ["unpruned", "fastv"]
        assert results["skipped"] == [{"method": "uniform", "keep": 0.25, "reason": "no such picture"}]
        names = list(read_journal(folder / "answers.sqlite")[1])
        assert len(names) == 2 * 4 + answered
    refusals = set()
    again = bench.measure(model, processor, tasks, [unpruned, flat, late], tmp_path / "4", settings)
    assert len(again["rows"]) == 3 and not again["skipped"]
    monkeypatch.setattr("codebook.inference.respond.answer_prompts", broken)
    with pytest.raises(CodebookError, match="a model that answers nothing"):
        bench.measure(model, processor, tasks, [unpruned, flat], tmp_path / "5", settings)


def test_parts_say_what_they_leave_out_and_so_does_the_run_that_joins_them(loaded, tmp_path, monkeypatch, caplog):
    model, processor, tasks, rows, _ = loaded
    rows, settings, seen = [rows[0], rows[3]], bench.BenchSettings(seconds=0, batch=2), []

    def refuse(self, tokens, keep, *, own=Uniform.select):
        seen.append(keep)
        if len(seen) > 1:  # the trial is the first
            raise CodebookError("no such picture")
        return own(self, tokens, keep)

    monkeypatch.setattr(Uniform, "select", refuse)
    caplog.set_level("WARNING", logger="codebook")
    left = {"skipped": [{"method": "uniform", "keep": 0.25, "reason": "no such picture"}]}
    for part in ((1, 2), (2, 2)):
        seen.clear()
        assert bench.measure(model, processor, tasks, rows, tmp_path, settings, shard=part) == left
    seen.clear()
    results = bench.measure(model, processor, tasks, rows, tmp_path, settings)
    assert results["skipped"] == left["skipped"] and [row["method"] for row in results["rows"]] == ["unpruned"]
    assert caplog.text.count("left out: uniform at 0.25: no such picture") == 3


def test_a_method_of_frames_beside_stills_says_why_it_is_left_out(tmp_path, monkeypatch, caplog):
    model, processor = load("miniature", "cpu")
    rows, _ = plan(model, ["evs"], [0.5])
    caplog.set_level("WARNING", logger="codebook")
    monkeypatch.setattr(bench, "respond", lambda *_, **__: pytest.fail("answered"))
    with pytest.raises(pytest.fail.Exception):  # it is said before anything is answered
        bench.measure(model, processor, load_data(["miniature:exist", "miniature:video"], 1), rows[:2], tmp_path)
    assert "left out: evs at 0.5: evs keeps the first frame whole" in caplog.text
    assert caplog.text.strip().endswith("fewer pictures than others: bench films alone")


def broken(*_):
    raise CodebookError("a model that answers nothing")


def test_answers_per_second(loaded, tmp_path, monkeypatch):
    """Batches of 1 and 3: as many prompts per forward, and a rate of size over seconds; or none, out of memory."""
    model, processor, tasks, rows, _ = loaded
    settings = bench.BenchSettings(seconds=0, batches=(1, 3))
    alone, some = [replace(task, samples=task.samples[:1]) for task in tasks], [rows[0], rows[3]]
    sizes = []

    def timed(self, schedule, tokens, *, own=latency.TimedPrompt.generate, **options):
        out = own(self, schedule, tokens, **options)
        sizes.append(len(self.inputs["input_ids"]))
        if len(self.inputs["input_ids"]) == 3 and schedule is None:
            raise torch.OutOfMemoryError
        return out

    monkeypatch.setattr(latency.TimedPrompt, "generate", timed)
    results = bench.measure(model, processor, alone, some, tmp_path, settings)
    found = [row["cost"]["throughput"] for row in results["rows"]]
    assert sizes.count(3) == 2 * costs.ROUNDS[0] and found[0]["3"] is None
    assert found[1]["3"]["rounds"] == costs.ROUNDS[0] and found[1]["3"]["median"] > found[1]["1"]["median"] > 0
    results |= {"name": "miniature", "data": ["miniature"], "keeps": KEEPS[:1], "samples": []}
    text = report.markdown(json.loads(json.dumps(results)))
    assert "| answers/s, batch 1 | answers/s, batch 3 |" in text and text.count("| unknown |") == 1
    assert "--throughput 1,3" in report.command_of(results) and "answers/s, batch 3" in report.html(results)
    now = iter([0.0, 2.0])
    one = latency.TimedPrompt.of(model, processor, tasks[0].samples[0].pictures(), tasks[0].samples[0].question)
    three = one.repeated(3)
    monkeypatch.setattr(latency.TimedPrompt, "generate", lambda *_: None)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(now))
    assert three.rate(None) == 1.5


def test_times_of_another_attention_are_not_taken_and_more_seconds_add_rounds(loaded, tmp_path, monkeypatch):
    model, processor, tasks, rows, _ = loaded
    few = [replace(task, samples=task.samples[:1]) for task in tasks]
    monkeypatch.setattr(costs, "ROUNDS", (2, 5))

    def rounds(seconds, attention="sdpa"):
        model.set_attn_implementation(attention)
        try:
            found = bench.measure(model, processor, few, rows[:1], tmp_path, bench.BenchSettings(seconds=seconds))
        finally:
            model.set_attn_implementation("sdpa")
        [row] = found["rows"]
        assert found["attention"] == attention
        return row["cost"]["first_token"]["rounds"], len(list(tmp_path.glob("timing-*.sqlite")))

    now = iter(range(10**6))
    monkeypatch.setattr(costs.time, "monotonic", lambda: float(next(now)))
    assert rounds(0) == (2, 1)
    assert rounds(0) == (2, 1)  # nothing new
    assert rounds(2) == (4, 1)  # the clock is read after the second round and each later one
    assert rounds(1) == (4, 1)
    assert rounds(100) == (5, 1)
    assert rounds(0, "eager") == (2, 2)


def test_what_is_shown_is_spread_over_tasks_and_then_over_their_questions():
    def shown(counts, count):
        tasks = [Task(str(i), [f"{i}{j}" for j in range(n)], None) for i, n in enumerate(counts)]
        return samples_to_show(tasks, count)

    assert shown([9], 3) == ["00", "01", "02"] and shown([1], 3) == ["00"] and shown([], 3) == shown([9], 0) == []
    assert shown([9, 9, 9, 9], 2) == ["00", "20"] and shown([2, 1, 2], 4) == ["00", "10", "20", "01"]


def test_progress_counts_the_answers_of_rows_that_are_refused(loaded, tmp_path, monkeypatch):
    model, processor, tasks, rows, _ = loaded
    few, rows, heard = [replace(task, samples=task.samples[:1]) for task in tasks], [rows[0], rows[3]], []

    def refuse(self, tokens, keep):
        raise CodebookError("no such picture")

    monkeypatch.setattr(Uniform, "select", refuse)
    bench.measure(model, processor, few, rows, tmp_path, bench.BenchSettings(seconds=0), lambda *own: heard.append(own))
    counts, notes = zip(*heard, strict=True)
    assert counts[0] == 2 and counts[-1] == max(counts) == bench.count_answers(few, rows) == 4
    assert set(notes) == {"", "memory 1/1", "timing, round 1", "timing, round 2"}


def test_the_command_says_what_was_asked():
    """Of results of earlier versions, which have less, as much as they say."""
    rows = [{"method": "unpruned", "seeds": 1}, {"method": "fastv@2", "seeds": 3}]
    old = {"name": "m", "rows": rows, "keeps": [0.5], "seed": 0, "data": ["own.jsonl"]}
    old["tasks"] = {"a": {"samples": 4}, "b": {"samples": 4}}
    begin, end = "codebook bench m --data own.jsonl --methods fastv@2 --keep 0.5", " --seeds 3 --seed 0 --out bench"
    assert report.command_of(old) == f"{begin} --count 4{end}"
    asked = {"count": 5, "max_new_tokens": 512, "codebook": "my book"}
    assert report.command_of(old | asked) == f"{begin} --count 5 --max-new-tokens 512 --codebook 'my book'{end}"
    assert report.command_of(old | dict.fromkeys(asked)) == begin + end
    with_machine = old | {"machine": {"device": "cpu"}, "dtype": "float32", "attention": "sdpa", "count": None}
    assert report.command_of(with_machine) == begin + end
    other = {"machine": {"device": "cuda"}, "attention": "eager"}
    assert "--seed 0 --dtype float32 --attn eager --out" in report.command_of(with_machine | other)


class Page(HTMLParser):
    """Checks that tags are closed in order, and notes ids and whatever points elsewhere."""

    VOID = ("meta", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_is_one_file_that_needs_no_other(measured):
    results, samples, _ = measured
    curve = {"loss": [0.5, 0.1, 0.0], "error": [0.1, 0.05, None], "layer": 1, "interval": [1, 2], "safe": 2}
    horizon = {"eps": 0.01, "start": 0, "horizons": {"exist": curve}}
    results = results | {"name": "<b>&model</b>"}
    text = report.html(results, [sample.pictures() for sample in samples], horizon)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("data:image/") or link.removeprefix("#") in page.ids for link in page.links)
    assert text.count("<script") == text.count("<script>") == 1
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert "&lt;b&gt;&amp;model&lt;/b&gt;" in text and "<b>&model" not in text
    words = " ".join(page.words)
    for row in results["rows"]:
        assert row["method"] in words and row["schedule"] in words
    marked = set(re.findall(r'<g class="series" data-m="([^"]*)"', text))
    assert marked == {row["method"] for row in results["rows"]} == set(re.findall(r'<li data-m="([^"]*)"', text))
    assert "All visual tokens stay." in words and "Keep the tokens that are least like any prototype" in words
    for task in results["tasks"].values():
        assert f"<small>{task['samples']}</small></th>" in text
    assert "Measured by" in words and "codebook bench" in words
    assert "exist: horizon 1 [1, 2], safe from 2" in words and "out of reach" in words
    without = report.html(results | {"samples": []})
    assert "What was kept" not in without and "Information horizon" not in without


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_the_report_is_sorted_filtered_and_read_on_a_telephone(measured, tmp_path):
    (tmp_path / "report.html").write_text(report.html(measured[0] | {"samples": []}))
    rows = "[...document.querySelector('table.sorted').tBodies[0].rows].filter(row => !row.hidden)"
    with Browser(390, 800, mobile=True) as page:
        page.open((tmp_path / "report.html").as_uri())
        page.wait("document.readyState === 'complete'")
        assert page.run("document.documentElement.scrollWidth") <= 390
        assert page.run(f"{rows}[0].cells[1].getBoundingClientRect().right") < 390  # the mean is in sight
        assert page.run("document.querySelector('.wide').classList.contains('more')")
        page.run("document.querySelectorAll('table.sorted thead button')[1].click()")
        means = page.run(f"{rows}.map(row => parseFloat(row.cells[1].textContent))")
        assert means == sorted(means, reverse=True)
        page.run("document.querySelectorAll('table.sorted thead button')[1].click()")
        assert page.run(f"{rows}.map(row => parseFloat(row.cells[1].textContent))") == means[::-1]
        page.run("document.querySelectorAll('.legend li button')[1].click()")
        lit = page.run("[...document.querySelectorAll('.on')].map(node => node.dataset.m)")
        assert len(set(lit)) == 1 and page.run("document.querySelectorAll('.series.on').length") == 2
        page.run(
            "{ const find = document.getElementById('find'); find.value = 'FASTV'; "
            "find.dispatchEvent(new Event('input')); }"
        )
        assert page.run(f"{rows}.map(row => row.dataset.m)") == ["fastv"]
        assert not page.messages


CURVE = {"loss": [0.5, 0.1], "error": [0.1, None], "layer": 1, "interval": [1, 2], "safe": 2}
ODD = [None, 3, "x", [], {}, [[]], [None], [1, 2, 3], {"a": 1}, float("nan")]


@pytest.mark.parametrize("key", [None, "eps", "start", "horizons", "exist", "loss", "error", "interval", "unknown"])
def test_a_horizon_of_another_form_is_refused_or_drawn(measured, tmp_path, key):
    """Every part in turn replaced by every odd value: the report is a page, or the file is refused in one line."""
    file = tmp_path / "horizon.json"
    for odd in ODD:
        whole = {"eps": 0.01, "start": 0, "horizons": {"exist": dict(CURVE)}, "more": 1}
        if key in CURVE or key == "unknown":
            whole["horizons"]["exist"][key] = odd
        elif key == "exist":
            whole["horizons"]["exist"] = odd
        elif key is not None:
            whole[key] = odd
        file.write_text(json.dumps(odd if key is None else whole))
        try:
            found = read_horizon(file)
        except CodebookError as error:
            assert "codebook horizon" in str(error) and "\n" not in str(error)
        else:
            Page(report.html(measured[0] | {"samples": []}, (), found))
    file.write_text(json.dumps({"eps": 0.01, "start": 0, "horizons": {"exist": CURVE}}))
    assert read_horizon(file)["horizons"]["exist"]["safe"] == 2


def test_a_horizon_of_which_nothing_is_known_is_shown_as_such(measured):
    curve = CURVE | dict.fromkeys(("layer", "interval", "safe")) | {"unknown": "answers 0 of 9 right"}
    page = report.html(measured[0] | {"samples": []}, (), {"eps": 0.01, "start": 0, "horizons": {"exist": curve}})
    assert "exist: horizon unknown, answers 0 of 9 right" in page and 'class="safe"' not in page
    assert 'class="band"' not in page  # one error is not known


def test_dropped_tokens_are_drawn_and_no_others():
    kept, grid = [0, 3, 4, 5, 10], (3, 4)
    drawn = set()
    for col, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", charts.dropped(kept, grid)):
        drawn |= {int(row) * 4 + int(col) + i for i in range(int(width))}
    assert drawn == set(range(12)) - set(kept)
    assert charts.dropped(range(12), grid) == ""


def test_the_frontier_and_round_numbers():
    points = [charts.Point(x, y, y, y, "") for x, y in ((1, 0.5), (2, 0.4), (2, 0.7), (3, 0.7), (4, 0.9))]
    assert [(p.x, p.y) for p in charts.pareto(points)] == [(1, 0.5), (2, 0.7), (4, 0.9)]
    assert charts.ticks(0.13, 0.97, 4) == [0.25, 0.5, 0.75] and charts.ticks(0, 12, 5) == [0, 2.5, 5, 7.5, 10]


def test_markdown_has_a_line_for_each_row(measured):
    text = report.markdown(measured[0])
    assert text.count("| unpruned |") == 4 and text.count("| codebook |") == 4 and text.count("| fastv |") == 2
    lines = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(lines) == {2 + 2 + 4, 2 + len(report.COSTS)}  # two tasks, their mean, its two changes, group A


def test_of_one_question_nothing_is_sure(loaded, tmp_path):
    """One question per task: no interval, in the results, the tables, the page and the comparison."""
    model, processor, tasks, rows, _ = loaded
    alone = [replace(task, samples=task.samples[:1]) for task in tasks]
    results = bench.measure(model, processor, alone, [rows[0], rows[1], rows[3], rows[4]], tmp_path, SETTINGS)
    for row in results["rows"]:
        assert row["mean"]["interval"] is row["mean"]["change_interval"] is None
        assert {task["interval"] for task in row["tasks"].values()} == {None}
    assert results["rows"][1]["against"]["change_interval"] is None
    results |= {"name": "miniature", "data": [], "keeps": KEEPS[:1], "samples": []}
    text, page = report.markdown(results), report.html(json.loads(json.dumps(results)))
    assert "± 0.0" not in text + page and text.count("± unknown") == 4 + 3 + 2 and "interval unknown" in page
    assert "beyond the interval: none" in text


def test_of_a_few_equal_questions_nothing_is_sure_either(loaded, tmp_path):
    """Every row answers the same two questions right: the rule of three, 3 in 2, is no more than 1.

    Both tasks ask about the same two scenes, and so together they say no more than one of them.
    """
    model, processor, tasks, rows, _ = loaded
    plain = [rows[0], replace(rows[0], method="same", keep=0.25)]

    def is_right(sample):
        return ask(model, processor, [sample.pictures()], [sample.question])[0].text == sample.answer

    right = [replace(task, samples=[s for s in task.samples if is_right(s)][:2]) for task in tasks]
    assert all(len(task.samples) == 2 for task in right)
    row = bench.measure(model, processor, right, plain, tmp_path, SETTINGS)["rows"][1]
    assert row["mean"]["change"] == 0 and row["mean"]["change_interval"] == pytest.approx([-1, 1])
    assert row["mean"]["interval"] == pytest.approx([0, 1], abs=1e-9)


def test_one_round_has_no_quartiles():
    assert quartiles([2.0]) == {"q1": None, "median": 2.0, "q3": None, "rounds": 1}
    cost = {key: quartiles([1.0]) for key in ("first_token", "speedup", "vision", "selector", "prefill", "decode")}
    cells = report._spent({"cost": cost | {"peak_memory": 1, "kv_cache": 1, "flops": 1}, "kept": {"average": 1.0}})
    assert [cell["small"] for cell in cells if cell["small"]] == ["± unknown"] * 3


def test_markdown_says_who_is_ahead_of_the_row_compared_with(measured):
    results = json.loads(json.dumps(measured[0]))
    for row in results["rows"]:
        for task in row.get("against", {}).get("tasks", {}).values():
            task["change_interval"] = [-0.1, 0.3]
    codebook = results["rows"][1]["against"]["tasks"]["ocr"]
    codebook |= {"change": 0.125, "change_interval": [0.01, 0.24]}
    text = report.markdown(results)
    assert "others are above uniform beyond the interval: codebook (ocr +12.5).\n" in text
    assert text.count("beyond the interval: none.") == 1  # at the other budget


def test_a_row_compared_with_that_was_left_out_is_not_said_to_be_ahead(measured):
    """At the small budget `fastv` is out of reach."""
    results = json.loads(json.dumps(measured[0])) | {"against": "fastv"}
    for row in results["rows"]:
        if row["keep"] < 0.1 or row["method"] == "fastv":
            row.pop("against", None)
    above, below = report.markdown(results).split("## keep 0.05")
    assert "| against fastv |" in above and "beyond the interval: " in above
    assert "against fastv |" not in below and "beyond the interval: " not in below
    assert "No row is compared with fastv at this budget, which was left out: " in below


def test_rows_that_are_equally_good_are_all_the_best(measured):
    results = json.loads(json.dumps(measured[0]))
    for row in results["rows"][1:4]:
        row["mean"]["score"] = 1.0
    quality = report._tables(results)[0]["rows"]
    assert {row["method"] for row in quality if row["cells"][0]["best"]} == {"codebook", "fastv", "uniform"}


def test_a_task_with_a_bar_in_its_name_is_one_column(measured):
    text = json.dumps(measured[0]).replace('"ocr"', '"o|cr"')
    lines = [line.replace("\\|", "") for line in report.markdown(json.loads(text)).splitlines() if line[:1] == "|"]
    assert {line.count("|") for line in lines} == {2 + 2 + 4, 2 + len(report.COSTS)}


def test_what_is_shown_is_what_pruning_keeps(loaded, measured):
    results, samples, _ = measured
    first = results["samples"][0]
    assert (first["question"], first["grids"]) == (samples[0].question, [[12, 12]])
    kept = {(row["method"], row["keep"]): row["kept"] for row in first["rows"]}
    side = range(1, 12, 2)
    assert kept["uniform", 0.25] == [[12 * row + col for row in side for col in side]]
    assert kept["unpruned", 1.0] == [list(range(144))]


def test_a_longer_run_asks_only_what_is_new(loaded, tmp_path, monkeypatch):
    """Four questions of each of two tasks after three of one, in batches of two: one batch is the same."""
    model, processor, _, rows, _ = loaded
    rows, settings, asked = [rows[0], rows[3]], bench.BenchSettings(batch=2, seconds=0), []

    def noted(model, processor, prompts, *args, own=respond.answer_prompts):
        asked.append(prompts.inputs["input_ids"].shape[0])
        return own(model, processor, prompts, *args)

    monkeypatch.setattr(respond, "answer_prompts", noted)
    kinds = ["miniature:exist", "miniature:ocr"]
    short, long = load_data(kinds[:1], 3), load_data(kinds, 4)
    bench.measure(model, processor, short, rows, tmp_path, settings)
    assert asked == [2, 2, 1, 1]
    found = bench.measure(model, processor, long, rows, tmp_path, settings)
    assert asked == [2, 2, 1, 1] + 2 * 3 * [2]
    anew = bench.measure(model, processor, long, rows, tmp_path / "anew", settings)
    assert [row["tasks"] for row in found["rows"]] == [row["tasks"] for row in anew["rows"]]


def test_a_journal_of_another_kind_of_answers_is_refused(loaded, measured):
    model, processor, tasks, rows, _ = loaded
    with pytest.raises(CodebookError, match="another max_new_tokens: choose another file, or delete it"):
        bench.measure(model, processor, tasks, rows, measured[2], bench.BenchSettings(seconds=0, max_new_tokens=3))


def test_pictures_of_a_comparison():
    from codebook.inference.overlay import comparison, maps, stages_picture

    ways = [("a", "yes", [0, 5]), ("b", "no " * 80, [])]
    red = Image.new("RGB", (8, 8), "red")
    drawn = comparison([(heading, words, stages_picture(red, [kept], (2, 3))) for heading, words, kept in ways])
    assert drawn.width > 1100
    for n, columns in ((1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (6, 3), (7, 4), (8, 4), (9, 3)):
        page = comparison([("a", "yes", Image.new("RGB", (80, 8)))] * n)
        assert (page.width - 16) // (80 + 16) == columns, n
    shown = maps(ways, (2, 3), 40, "#.").splitlines()
    assert [line.split() for line in shown[-2:]] == [["#..", "..."], ["..#", "..."]]


def test_quartiles():
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0, "rounds": 5}


def test_answers_under_other_settings_of_generate_are_refused(loaded, tmp_path, monkeypatch):
    model, processor, tasks, rows, _ = loaded
    few, settings = [replace(task, samples=task.samples[:1]) for task in tasks], bench.BenchSettings(seconds=0)
    bench.measure(model, processor, few, rows[:1], tmp_path, settings)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.5)
    with pytest.raises(CodebookError, match="another generation: choose another file, or delete it"):
        bench.measure(model, processor, few, rows[:1], tmp_path, settings)


@pytest.mark.parametrize("change", ["size", "chat_template"])
def test_answers_of_another_processor_are_refused(loaded, tmp_path, change):
    """The weights are the same, and the pictures or the prompts are others."""
    model, processor, tasks, rows, _ = loaded
    few, settings = [replace(task, samples=task.samples[:1]) for task in tasks], bench.BenchSettings(seconds=0)
    bench.measure(model, processor, few, rows[:1], tmp_path, settings)
    _, other = load("miniature", "cpu")
    bench.measure(model, other, few, rows[:1], tmp_path, settings)
    if change == "size":
        other.image_processor.image_mean = [0.4, 0.5, 0.5]
    else:
        other.chat_template = other.chat_template.replace("<assistant>", "<user>")
    with pytest.raises(CodebookError, match="another processor: choose another file, or delete it"):
        bench.measure(model, other, few, rows[:1], tmp_path, settings)
