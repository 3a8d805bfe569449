"""Pruning that is switched on and off is that of a `with`; what it adds up is counted by hand."""

import copy
import gc
import io
import json
import threading
import weakref

import pytest
import torch
from PIL import Image

import codebook
from codebook.errors import CodebookError
from codebook.pruning import FastV, Random, Schedule, Stage, Uniform
from codebook.pruning.engine import statistics
from codebook.pruning.engine.context import in_force
from tests.prompts import ONE, RAGGED, prompt
from tests.tiny import llava

TWO = Schedule([Stage(0, 9, Uniform()), Stage(2, 4, FastV())])  # of 36 tokens in 4 layers: 9, 9, 4, 4


@pytest.fixture
def model():
    return llava()


def generated(model, inputs, **options):
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)


def test_enabled_is_a_context_that_stays_open(model):
    inputs = prompt(model, RAGGED)
    plain = generated(model, inputs)
    with TWO(model) as inside:
        expected = generated(model, inputs)
    assert not torch.equal(plain, expected)
    pruning = codebook.enable(model, TWO)
    assert torch.equal(generated(model, inputs), expected) and in_force(model) is pruning
    other = []
    thread = threading.Thread(target=lambda: other.append(generated(model, inputs)))
    thread.start()
    thread.join()
    assert torch.equal(other[0], expected)
    with Schedule([])(model, scope="thread"):
        assert torch.equal(generated(model, inputs), plain)
    assert codebook.disable(model) is pruning and in_force(model) is None
    assert torch.equal(generated(model, inputs), plain)
    assert not model._forward_pre_hooks and "generate" not in vars(model)
    assert all(
        torch.equal(a, b) for x, y in zip(inside.kept, pruning.kept, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_switching_on_twice_and_off_twice_is_refused(model):
    with pytest.raises(CodebookError, match="LlavaForConditionalGeneration is not enabled"):
        codebook.disable(model)
    with TWO(model):
        with pytest.raises(CodebookError, match="already being pruned"):
            codebook.enable(model, TWO)
        with pytest.raises(CodebookError, match=r"is not enabled.*a context of `with` ends by itself"):
            codebook.disable(model)
    pruning = codebook.enable(model, TWO)
    for again in (lambda: codebook.enable(model, TWO), lambda: Schedule([])(model).__enter__()):
        with pytest.raises(CodebookError, match=r"enabled with 'uniform:9, fastv@2:4' already.*disable\(model"):
            again()
    with pytest.raises(CodebookError, match="open already"), pruning:
        pass
    with pytest.raises(CodebookError, match="cannot be copied"):
        copy.deepcopy(model)
    thread = threading.Thread(target=codebook.disable, args=(model,))  # a server stops from where it likes
    thread.start()
    thread.join()
    codebook.enable(model, TWO)
    codebook.disable(model)


def test_an_enabled_model_is_freed_like_any_other():
    model = llava()
    codebook.enable(model, TWO)
    generated(model, prompt(model, ONE))
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None


def test_statistics_add_up(model):
    one, three = prompt(model, ONE), prompt(model, RAGGED)  # RAGGED: rows with 1 and 2 images
    with TWO(model) as pruning:
        generated(model, one)
        generated(model, three, use_cache=False)  # shows its prompt three times, and counts once
        model(**one)
        with pytest.raises(CodebookError):
            model(inputs_embeds=torch.zeros(1, 5, 48))
        found = pruning.statistics
    images = sum(row.count("image") for row in ONE + RAGGED + ONE)
    assert (found.forwards, found.images, found.tokens) == (3, images, 36 * images)
    assert found.kept == images * (9 + 9 + 4 + 4) / 4 and found.keep == pytest.approx(TWO.budget(36, 4))
    assert 0 < found.selector_seconds < 60 and f"{images} images" in repr(pruning)
    assert TWO(model).statistics == statistics.Statistics() and statistics.Statistics().keep == 1


def test_selector_time_on_a_gpu_is_read_late(monkeypatch):
    """Events are recorded in place, and asked for what has passed only by who reads the statistics."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "stream of cuda:1"

        def query(self):
            return False

        def synchronize(self):
            asked.append("synchronize")

        def elapsed_time(self, end):
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    tally = statistics.Tally(layers=2)
    for _ in range(2):
        with tally.timing(torch.device("cuda:1")):
            pass
    assert tally.read(wait=False).selector_seconds == 0 and not asked
    assert tally.read().selector_seconds == 3 and len(asked) == 2
    assert tally.read().selector_seconds == 3 and len(asked) == 2


def test_what_was_kept_is_saved(model, tmp_path):
    with Schedule([Stage(0, 3, Random())])(model) as pruning:
        with pytest.raises(CodebookError, match="no image was shown"):
            pruning.save(tmp_path / "kept.json")
        model(**prompt(model, ONE))
    pruning.save(tmp_path / "kept.json")
    [kept] = pruning.kept[0]
    assert json.loads((tmp_path / "kept.json").read_text()) == {
        "format": 1,
        "schedule": "random:3",
        "images": [
            {
                "kind": "image",
                "grids": [{"kind": "view", "rows": 6, "cols": 6, "box": [0, 0, 1, 1]}],
                "stages": [{"layer": 0, "stage": "random:3", "kept": [kept.tolist()]}],
            }
        ],
    }
    with pytest.raises(CodebookError, match="create it first"):
        pruning.save(tmp_path / "no" / "kept.json")


def test_ask_leaves_an_enabled_model_as_it_is():
    """`ask` without a schedule is pruned by what is enabled; a schedule of its own comes first."""
    model, processor = codebook.load("miniature")
    picture = Image.effect_noise((96, 96), 90).convert("RGB")

    def asked(schedule=None):
        [answer] = codebook.ask(model, processor, [[picture]], ["describe."], schedule, max_new_tokens=2)
        return answer

    pruning = codebook.enable(model, Schedule([Stage(0, 36, Uniform())]))
    assert asked().counts == [[144, 36]] and asked(Schedule([])).counts == [[144]]
    assert asked(Schedule([Stage(0, 9, Uniform())])).counts == [[144, 9]]
    assert pruning.statistics.images == 1 and codebook.disable(model).statistics.kept == 36
    plain = asked()
    assert plain.counts == [[144]] and repr(plain).endswith("from 144 of 144 visual tokens>")
    drawn = Image.open(io.BytesIO(plain._repr_png_()))
    assert drawn.size == plain.overlay().size == (2 * 576 + 16, 576)
    [blind] = codebook.ask(model, processor, [[]], ["describe."], max_new_tokens=1)
    assert blind._repr_png_() is None
    with pytest.raises(CodebookError, match="no pictures"):
        blind.overlay()
