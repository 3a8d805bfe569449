"""Builds that stop once more images change nothing."""

import json

import pytest

from codebook.building import Pilot, Stability, SurvivorPool, is_stable, stability
from codebook.building.pilot import shuffled
from codebook.errors import CodebookError
from tests.building.folders import contents, run
from tests.building.tiny import settings


@pytest.fixture
def small(monkeypatch):
    """Comparisons from two images on, on two that are set aside."""
    monkeypatch.setattr(stability, "FIRST", 2)
    monkeypatch.setattr(stability, "FEWEST", 2)


def test_agreement_by_hand():
    # of ten tokens two are kept: random choices share 0.2
    one, half, none = {1, 2}, {2, 3}, {3, 4}
    assert stability.agreement([one], [one], [10]) == 1
    assert stability.agreement([one], [half], [10]) == pytest.approx((0.5 - 0.2) / 0.8)
    assert stability.agreement([one, one], [none, one], [10, 10]) == pytest.approx((-0.25 + 1) / 2)


def test_numbers_of_images_double():
    assert stability.sizes(200) == [32, 64, 128, 200] and stability.sizes(64) == [32, 64]
    order = [str(i) for i in range(120)]
    build, held = stability.set_aside(order)
    assert (build, held) == (order[:108], order[108:])
    with pytest.raises(CodebookError, match=r"36 different images cannot show.*more than 36, or leave --until-stable"):
        stability.set_aside(order[:36])


@pytest.mark.parametrize("level", [0.01, 1.0])
def test_build_until_stable(tiny, pictures, tmp_path, small, level):
    """At a level that any agreement reaches it stops after the first comparison, else with all images."""
    states = []
    book = run(tiny, pictures, tmp_path / "out", stability=Stability(level), progress=states.append)
    report = book.config["stability"]
    images = [point["images"] for point in report["curve"]]
    assert images == ([2, 4] if level < 1 else [2, 4, 6]) and report["set_aside"] == 2
    assert is_stable(report) == (level < 1) and book.config["images"]["used"] == images[-1]
    order = shuffled([p.relative_to(pictures).as_posix() for p in pictures.rglob("*.*")], 0)
    assert set(SurvivorPool.load(tmp_path / "out")[1].images) == set(order[: images[-1]])
    notes = [state.note for state in states if state.note]
    assert len(notes) == len(images) and f"agreement with {images[-2]} images" in notes[-1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {images[-1]} | {len(book)} | {report['curve'][-1]['agreement']} |" in card
    # the same codebook as from those images alone
    run(tiny, [pictures / name for name in order[: images[-1]]], tmp_path / "alone")
    assert (
        contents(tmp_path / "alone")["prototypes.safetensors"] == contents(tmp_path / "out")["prototypes.safetensors"]
    )


def test_with_a_pilot_stopped_and_asked_again(tiny, pictures, tmp_path, small):
    asked = {"settings": settings(tau_p=None, tau_j=None), "pilot": Pilot(2, 0.4), "stability": Stability(1.0)}
    run(tiny, pictures, tmp_path / "whole", **asked)
    for phase, at in (("pilot", 1), ("build", 5)):

        def stop(state, phase=phase, at=at):
            if (state.phase, state.done) == (phase, at):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tiny, pictures, tmp_path / "out", progress=stop, **asked)
    run(tiny, pictures, tmp_path / "out", **asked)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    states = []
    run(tiny, pictures, tmp_path / "out", progress=states.append, **asked)
    assert len(states) == 1
    with pytest.raises(CodebookError, match="another stability"):
        run(tiny, pictures, tmp_path / "out", **asked | {"stability": Stability(0.5)})
    with pytest.raises(CodebookError, match="another"):
        run(tiny, pictures, tmp_path / "out", **asked | {"stability": None})
    assert {"pilot.png", "stability.png"} <= set(json.loads((tmp_path / "out/config.json").read_text())["sha256"])
