"""The small Gemma 4: layers that are given embeddings of their own, and layers that use the keys of earlier ones."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file

from codebook import models
from codebook.analysis import layer_sweep
from codebook.analysis.deep_stages import candidate_schedules
from codebook.errors import CodebookError
from codebook.inference.samples import Sample
from codebook.pruning import DivPrune, Random, Schedule, Stage
from codebook.pruning.presets import SCHEDULE_PRESETS
from tests import reference
from tests.models.cells import gone_from, mass, model
from tests.models.families import FAMILIES

NAME = "gemma4_e2b"
pytestmark = pytest.mark.skipif(NAME not in FAMILIES, reason="it needs a newer transformers")
ROWS = [["image", 5, 6, 7], [3, "large", 9, "image", 8, 11, 12]]
LAST, LAYERS = 3, 7
SCHEDULE = Schedule([Stage(0, 0.5, DivPrune(), mass=True), Stage(LAST, 0.25, Random(), mass=True)])


@pytest.fixture
def lengths():
    """Tokens that each decoder layer is given, forward by forward."""
    target, seen = model(NAME, "sdpa"), []
    hooks = [layer.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
             for layer in target.get_decoder().layers]  # fmt: skip
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one", "padded"])
@pytest.mark.parametrize("keep", [1, 3, 9])
def test_layers_without_keys_run_on_the_last_tokens_alone(rows, keep, lengths):
    """Of a padded prompt on as many as are asked for; without padding stock classes cut to one only."""
    target, inputs = model(NAME, "sdpa"), FAMILIES[NAME].inputs(rows)
    with SCHEDULE(target) as pruning:
        whole = target(**inputs).logits
        assert len(set(lengths[LAST:])) == 1
        lengths.clear()
        cut = target(**inputs, logits_to_keep=keep).logits
    assert (cut - whole[:, -keep:]).abs().max() <= 2e-5 * whole.abs().max()
    assert lengths[-1] == (keep if keep == 1 or len(rows) > 1 else lengths[LAST])
    columns = FAMILIES[NAME].columns(rows)
    given = columns, pruning.kept, SCHEDULE.stages
    _, theirs = reference.masked(target, inputs, gone_from(inputs, *given), mass=mass(*given))
    assert (cut[:, -1] - theirs[:, 0]).abs().max() <= 2e-5 * theirs.abs().max()


@torch.no_grad()
def test_a_further_turn_on_a_cache_of_a_model_whose_layers_reuse_keys():
    """Tokens of text behind a pruned prompt; of several at once the layers without keys see the last ones alone."""
    target, tiny = model(NAME, "sdpa"), FAMILIES[NAME]
    inputs, more = tiny.inputs(ROWS), torch.tensor([[25, 26, 27], [28, 29, 30]])
    whole, positions = reference.followed(inputs, more)
    with SCHEDULE(target) as pruning:
        cache = target(**inputs, position_ids=positions[:, :-3], use_cache=True).past_key_values
        now = {"input_ids": more, "attention_mask": whole["attention_mask"], "position_ids": positions[:, -3:]}
        ours = target(**now, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    given = tiny.columns(ROWS), pruning.kept, SCHEDULE.stages
    _, theirs = reference.masked(target, whole, gone_from(whole, *given), mass=mass(*given))
    assert (ours - theirs[:, 0]).abs().max() <= 2e-5 * theirs.abs().max()


def test_stages_behind_the_keys_that_are_used_again_are_refused():
    target = model(NAME, "sdpa")
    with pytest.raises(
        CodebookError, match=r"at layer 4, but the last layers .* use those of layer 3: use layers up to 3, as in 'ran"
    ):
        Schedule([Stage(LAST + 1, 0.5, Random())])(target)
    size = models.shape(target)
    assert size.attending == frozenset(range(LAYERS - 2)) and size.reusing == {LAYERS - 2, LAYERS - 1}
    assert size.stages == LAST + 1


@pytest.mark.parametrize("name", sorted(SCHEDULE_PRESETS))
def test_presets_with_late_stages_are_refused_with_one_that_works(name):
    """The one that the error shows has the early stages, and the first late one as late as can be."""
    target = model(NAME, "sdpa")
    schedule = Schedule.for_model(target, name)
    if name == "vtw":  # of which the layer is a guess
        assert schedule.stages[0].layer == LAST
    if max(stage.layer for stage in schedule.stages) <= LAST:
        schedule(target)
        return
    with pytest.raises(CodebookError) as refusal:
        schedule(target)
    instead = Schedule.parse(str(refusal.value).rpartition("as in '")[2].removesuffix("'"))
    assert instead.stages[-1].layer == LAST and instead.positions == schedule.positions
    instead(target)


def test_the_guess_of_a_horizon_is_a_layer_that_stages_can_be_at():
    target = model(NAME, "sdpa")
    schedule = Schedule.for_model(target, "divprune+random", keep=0.4)
    assert [stage.layer for stage in schedule.stages] == [0, LAST]
    schedule(target)
    _, candidates = candidate_schedules(target, "divprune", 0.5)
    assert {one.stages[-1].layer for one in candidates} == {1, 2, LAST}
    for one in candidates:
        one(target)


@torch.no_grad()
def test_a_horizon_is_looked_for_where_stages_can_be(monkeypatch):
    """One value per layer from 1 to the last that stages can be at, and none refused on the way."""
    target, asked = model(NAME, "sdpa"), []
    monkeypatch.setattr(layer_sweep, "check_samples", lambda *_: None)
    monkeypatch.setattr(layer_sweep, "prepare_samples", lambda *_: None)
    monkeypatch.setattr(layer_sweep, "remember", lambda _: contextlib.nullcontext())

    def answers(model, processor, prompts, schedule):
        schedule(model)
        asked.append([stage.layer for stage in schedule.stages])
        return [SimpleNamespace(text="2")]

    monkeypatch.setattr(layer_sweep, "answer_prompts", answers)
    sample = Sample([Image.new("RGB", (8, 8))], "how many?", "2", "count")
    found, _ = layer_sweep.sweep(target, None, [sample], "generated")
    assert asked == [[], *([layer] for layer in range(1, LAST + 1))]
    assert found.layers == LAST + 1 and found.pruned.shape == (1, LAST)


@torch.no_grad()
def test_flops_are_those_of_what_generate_runs(lengths):
    """Layer by layer: the tokens that it is given, those whose keys they meet, and the projections that it has."""
    target, inputs = model(NAME, "sdpa"), FAMILIES[NAME].inputs(ROWS[:1])
    with SCHEDULE(target) as pruning:
        target.generate(**inputs, max_new_tokens=1)
    size, met, expected = models.shape(target), {}, 0
    for given, layer, keys in zip(
        lengths, target.get_decoder().layers, models.family(target).keys_layers(target), strict=True
    ):
        met[keys] = max(given, met.get(keys, 0))
        maps = sum(hasattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        attention, mlp = 2 * given * met[keys] * size.hidden, 2 * given * size.hidden * size.intermediate
        expected += maps * given * size.hidden**2 + attention + mlp
    n = sum(image.count for image in pruning.images)
    shape = {"layers": LAYERS, "attending": size.attending, "reusing": size.reusing}
    widths = {"hidden": size.hidden, "intermediate": size.intermediate}
    text = inputs["input_ids"].shape[1] - n
    assert SCHEDULE.flops(n, text=text, **shape, **widths) == expected
    alone = Schedule(SCHEDULE.stages).flops(n, **shape, **widths)
    assert alone == SCHEDULE.flops(n, layers=LAYERS - 2, **widths)


def test_keys_that_a_checkpoint_has_and_no_layer_uses(tmp_path, monkeypatch):
    """The published ones have projections to keys and values in all layers."""
    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", lambda *_, **__: "processor")
    saved = model(NAME, "sdpa")
    saved.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    own = {name: x for name, x in held.items() if "language_model.layers.1.self_attn.k_" in name}
    more = {name.replace("layers.1.", f"layers.{LAYERS - 1}."): x.clone() for name, x in own.items()}
    assert len(more) == 2 and not more.keys() & held.keys()
    save_file(held | more, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, _ = models.load(str(tmp_path), "cpu")
    weights = loaded.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in saved.state_dict().items())
