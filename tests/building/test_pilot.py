"""Thresholds from a pilot: by hand on a few numbers, and in builds that are stopped, repeated, and grow."""

import json
from dataclasses import replace

import pytest
import torch

from codebook.building import Pilot, Settings, SurvivorPool, build, extend, merge, settings_for
from codebook.building.candidates import auto
from codebook.building.pilot import choose_thresholds, shuffled, words
from codebook.building.pool import cluster_count
from codebook.building.probes import Prober, pad_token
from codebook.errors import CodebookError
from codebook.store.codebook import Codebook
from tests.building.folders import contents, run
from tests.building.tiny import settings

OPEN = settings(tau_p=None, tau_j=None)
PILOT = Pilot(3, 0.4)


def piloted(tiny, images, out, **options):
    return run(tiny, images, out, **{"settings": OPEN, "pilot": PILOT} | options)


@pytest.fixture(scope="module")
def whole(tiny, pictures, tmp_path_factory):
    """The codebook of an uninterrupted build with a pilot."""
    out = tmp_path_factory.mktemp("whole") / "out"
    piloted(tiny, pictures, out)
    return contents(out)


def token(p1, jsd, size=1):
    """A token whose divergence in its region is `jsd` and none in the image."""
    return {"row": 0, "col": 0, "p1": p1, "jsd_region": jsd, "jsd_global": 0.0, "cluster_size": size}


# P1 and JSD are ranked 1 to 5 among the isolated; the last token is in a cluster too large
TOKENS = [token(0.1, 0.05), token(0.2, 0.01), token(0.3, 0.02), token(0.4, 0.03), token(0.5, 0.04), token(0.0, 0.0, 9)]


@pytest.mark.parametrize(
    ("select", "tau_p", "tau_j", "passed"),
    [
        # the tokens need ranks 5, 2, 3, 4 and 5 in the worse of their two conditions
        (1 / 6, 0.2001, 0.02001, 1),
        (2 / 6, 0.3001, 0.02001 + 0.01, 2),
        (3 / 6, 0.4001, 0.04001, 3),
        (4 / 6, 0.5001, 0.05001, 5),
        (1.0, 0.5001, 0.05001, 5),
        (0.001, 0.2001, 0.02001, 1),
    ],
)
def test_both_thresholds_are_the_same_quantile(select, tau_p, tau_j, passed):
    found, report = choose_thresholds(replace(OPEN, max_cluster_size=3), Pilot(2, select), [TOKENS[:2], TOKENS[2:]])
    assert (found.tau_p, found.tau_j) == pytest.approx((tau_p, tau_j))
    assert (report["passed"], report["isolated"], report["probed"], report["read"]) == (passed, 5, 6, 2)


def test_one_threshold_given():
    found, report = choose_thresholds(replace(OPEN, tau_p=0.35), Pilot(1, 2 / 6), [TOKENS[:5]])
    assert found.tau_p == 0.35 and found.tau_j == pytest.approx(0.02001) and report["passed"] == 2
    assert report["chosen"] == ["tau_j"]
    found, report = choose_thresholds(replace(OPEN, tau_j=0.025), Pilot(1, 1.0), [TOKENS[:5]])
    assert found.tau_j == 0.025 and found.tau_p == pytest.approx(0.3001) and report["passed"] == 2
    assert "no thresholds let 100.0% pass" in words(found, report)


def test_equal_values_pass_together():
    found, report = choose_thresholds(OPEN, Pilot(1, 0.03), [[token(0.25, 0.0) for _ in range(40)]])
    assert found.tau_p == pytest.approx(0.2501) and 0 < found.tau_j < 1e-9 and report["passed"] == 40
    assert "because many tokens have the same values" in words(found, report)


@pytest.mark.parametrize(
    ("tokens", "changes", "sentence"),
    [
        ([token(0.1, 0.1, 9)], {}, "none of 1 token is isolated in its image: raise max_cluster_size"),
        ([token(1.0, 0.1)], {}, r"same answer with certainty \(P1 is 1\), so none is redundant: give another prompt"),
        ([token(0.3, 0.1)], {"tau_p": 0.2}, r"no isolated token is below tau_p 0\.2, the lowest is 0\.3: raise it"),
    ],
)
def test_what_to_change_where_no_thresholds_are_found(tokens, changes, sentence):
    with pytest.raises(CodebookError, match=sentence):
        choose_thresholds(replace(OPEN, max_cluster_size=3, **changes), Pilot(1, 0.5), [tokens])


def test_a_build_with_the_pilots_thresholds_given_by_hand_is_the_same(tiny, pictures, tmp_path, whole):
    config = json.loads(whole["config.json"])
    found = {name: config["settings"][name] for name in ("tau_p", "tau_j")}
    assert config["pilot"]["read"] == 3 and config["pilot"]["probed"] == 3 * 36
    assert config["pilot"]["passed"] in (43, 44)  # of 108; two tokens may reach the quantile at once
    run(tiny, pictures, tmp_path / "out", settings=settings(**found))
    by_hand = contents(tmp_path / "out")
    for name in ("prototypes.safetensors", "survivors.safetensors"):
        assert by_hand[name] == whole[name]
    rows = [[json.loads(line) for line in files["provenance.jsonl"].splitlines()] for files in (by_hand, whole)]
    for a, b in zip(*rows, strict=True):
        assert a.pop("image") == b.pop("image") and a == pytest.approx(b, rel=1e-4)  # values of other batches
    assert whole["pilot.png"].startswith(b"\x89PNG") and b"A pilot on 3 images found" in whole["README.md"]


def test_the_pilots_probes_are_not_made_again(tiny, pictures, tmp_path, monkeypatch):
    batches, real = [], Prober.alone

    def alone(self, tokens):
        if not self.whole:  # near a threshold a token is probed again, alone
            batches.append(len(tokens))
        return real(self, tokens)

    monkeypatch.setattr(Prober, "alone", alone)
    piloted(tiny, pictures, tmp_path / "out")
    assert batches[:3] == [36] * 3 and len(batches) == 8  # three of the pilot, then the other five


@pytest.mark.parametrize(("phase", "at"), [("pilot", 1), ("pilot", 3), ("build", 1), ("build", 8)])
def test_stopped_anywhere_it_ends_with_the_same_bytes(tiny, pictures, tmp_path, whole, phase, at):
    def stop(state):
        if (state.phase, state.done) == (phase, at):
            raise KeyboardInterrupt

    out, states = tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        piloted(tiny, pictures, out, progress=stop)
    piloted(tiny, pictures, out, progress=states.append)
    assert states[0].phase == ("pilot" if phase == "pilot" and at < 3 else states[0].phase)
    assert contents(out) == whole
    again = []
    piloted(tiny, pictures, out, progress=again.append)  # nothing to do
    assert len(again) == 1 and contents(out) == whole
    with pytest.raises(CodebookError, match="another pilot"):
        piloted(tiny, pictures, out, pilot=Pilot(3, 0.3))


def test_a_pilots_choice_stands_when_images_are_added(tiny, pictures, tmp_path, whole):
    first = shuffled([p.relative_to(pictures).as_posix() for p in pictures.rglob("*.*")], 0)[-4:]

    def stop(state):
        if (state.phase, state.done) == ("build", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        piloted(tiny, [pictures / name for name in first], tmp_path / "out", progress=stop)
    book = piloted(tiny, pictures, tmp_path / "out")
    assert book.config["images"]["used"] == 8
    assert book.config["settings"]["tau_p"] != json.loads(whole["config.json"])["settings"]["tau_p"]


def test_images_that_cannot_be_read_are_replaced_in_the_pilot(tiny, pictures, tmp_path):
    names = sorted(p.relative_to(pictures).as_posix() for p in pictures.rglob("*.*"))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    files = [*(pictures / name for name in names), bad]
    book = piloted(tiny, files, tmp_path / "out", pilot=Pilot(8, 0.2))
    assert book.config["pilot"]["read"] == 8 and len(book.config["images"]["skipped"]) == 1


def test_what_a_pilot_found_grows(tiny, pictures, tmp_path, whole):
    names = sorted(p.relative_to(pictures).as_posix() for p in pictures.rglob("*.*"))
    for i in (0, 1):
        lines = "".join(json.dumps(name) + "\n" for name in names[i::2])
        (pictures / f"half{i}.jsonl").write_text(lines)
    halves = [pictures / f"half{i}.jsonl" for i in (0, 1)]
    try:
        one = piloted(tiny, halves[0], tmp_path / "one")
        more = extend(*tiny, tmp_path / "one", halves[1], tmp_path / "more")
        found = {name: one.config["settings"][name] for name in ("tau_p", "tau_j")}
        assert more.config["pilot"] == one.config["pilot"] and more.config["images"]["used"] == 8
        run(tiny, halves[1], tmp_path / "other", settings=settings(**found))
        for i, names in enumerate((("one", "other"), ("other", "one"))):
            merge(*(tmp_path / name for name in names), tmp_path / f"both{i}")
            assert contents(tmp_path / f"both{i}") == contents(tmp_path / "more")
        run(tiny, halves[1], tmp_path / "third")
        with pytest.raises(
            CodebookError, match=r"another tau_p, tau_j: they do not merge; build the images of one with"
        ):
            merge(tmp_path / "one", tmp_path / "third", tmp_path / "x")
    finally:
        for half in halves:
            half.unlink()


def test_a_spoiled_report_is_refused(tiny, pictures, tmp_path, whole):
    piloted(tiny, pictures, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["pilot"]["select"] = 3.0
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CodebookError, match=r"config\.json"):
        Codebook.load(tmp_path / "out")


def test_a_model_without_a_preset_needs_no_thresholds(tiny, pictures, tmp_path):
    model, _ = tiny
    found = settings_for(model)
    assert (found.candidates, found.max_cluster_size, found.clusters, found.free) == (
        "all",
        3,
        None,
        ["tau_p", "tau_j"],
    )
    book = build(
        *tiny, pictures, tmp_path / "out", model_id="tiny", settings=replace(found, prompt="w5 w6"), pilot=Pilot(4, 0.1)
    )
    assert len(book) == len(Codebook.load(tmp_path / "out"))
    assert SurvivorPool.load(tmp_path / "out")[0].config["pad"] == 0


def test_counts_are_in_proportion_to_the_published_ones():
    assert auto((24, 24), True) == ("ranks", 96) and auto((27, 27), False) == ("tiles", 81)
    assert auto((8, 8), False) == ("all", 64)  # four tiles
    assert [cluster_count(n) for n in (0, 30, 700, 1383, 20_000)] == [1, 1, 32, 64, 64]


def test_what_takes_a_removed_tokens_place(tiny):
    from tests.building.tiny import model, processor

    target, reader = model(), processor()
    assert pad_token(target, reader) == 0 and pad_token(target, reader, 7) == 7
    target.config.text_config.pad_token_id = None
    reader.tokenizer.pad_token = "w20"
    assert pad_token(target, reader) == 20
    reader.tokenizer.pad_token = None
    with torch.no_grad():
        target.get_input_embeddings().weight[0] = 1.0  # the padding row, which is zero
        target.get_input_embeddings().weight[41] *= 1e-3
    assert pad_token(target, reader) == 41
    with pytest.raises(CodebookError, match="pad is 100: this model's token ids end at 99"):
        pad_token(target, reader, 100)


@pytest.mark.parametrize(
    "wrong", [lambda: Pilot(0), lambda: Pilot(3, 0.0), lambda: Pilot(3, 1.5), lambda: Settings(pad=-1)]
)
def test_what_cannot_be_asked_for(wrong):
    with pytest.raises(CodebookError, match=r"needed|must be"):
        wrong()
