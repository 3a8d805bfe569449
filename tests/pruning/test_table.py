"""Every method on every tower: exact counts, and the same tokens alone, in a batch, under sdpa and eager, and again."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from codebook.pruning import METHODS, Schedule, Stage
from codebook.pruning.engine import selection
from codebook.pruning.engine.forward import Forward
from codebook.pruning.engine.views import Viewer
from tests.prompts import prompt
from tests.pruning.stages import ATTENTIONS, BATCH, KEEP, MODELS, ROWS, SINGLE, TOWERS, schedule
from tests.tiny import SIDE


def kept(tower, attention, plan, inputs):
    # As generate() numbers them: DART's norms are of rotated keys, and depend on it.
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), plan(model := MODELS[tower, attention]) as pruning:
        model(**inputs, position_ids=positions)
    return [stages[-1] for stages in pruning.kept]


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("name", SINGLE)
def test_kept_tokens(name, tower):
    plan = schedule(name, tower)
    together = kept(tower, "sdpa", plan, BATCH)
    assert len(together) == 3
    for index in together:
        assert (index.diff() > 0).all() and (index >= 0).all() and (index < SIDE**2).all()
        if plan.stages[0].keep is None:
            assert 1 <= len(index) < SIDE**2
        else:
            assert len(index) == plan.stages[0].keep
    first = 0
    for row in ROWS:
        images = row.count("image")
        alone = prompt(MODELS[tower, "sdpa"], [row])
        alone["pixel_values"] = BATCH["pixel_values"][first : first + images]
        for attention in ATTENTIONS:
            for _ in range(2):
                again = kept(tower, attention, plan, alone)
                assert all(map(torch.equal, again, together[first : first + images]))
        first += images
    assert all(map(torch.equal, kept(tower, "eager", plan, BATCH), together))


@pytest.mark.parametrize("name", sorted({*SINGLE} - {"drop", "downsample", "s2prune"}))
def test_a_stage_on_what_a_stage_left(name):
    """The second stage sees 20 scattered survivors."""
    stage = schedule(name, "clip").stages[0]
    plan = Schedule([Stage(0, 20, METHODS["random"]()), Stage(max(1, stage.layer), stage.keep, stage.pruner)])
    with torch.no_grad(), plan(model := MODELS["clip", "sdpa"]) as pruning:
        model(**BATCH)
    for first, second in pruning.kept:
        assert len(first) == 20 and set(second.tolist()) <= set(first.tolist())
        assert 1 <= len(second) < 20 if stage.keep is None else len(second) == stage.keep


@pytest.mark.parametrize("name", SINGLE)
def test_with_gradients_the_same_tokens_stay(name):
    """As for whoever calls the model without `torch.no_grad`, or trains it."""
    plan, model = schedule(name, "clip"), MODELS["clip", "sdpa"]
    expected = kept("clip", "sdpa", plan, BATCH)
    positions = (BATCH["attention_mask"].cumsum(1) - 1).clamp(min=0)
    weight = model.model.multi_modal_projector.linear_2.weight
    with plan(model) as pruning:
        loss = model(**BATCH, position_ids=positions).logits[:, -1].sum()
    assert all(map(torch.equal, expected, (stages[-1] for stages in pruning.kept)))
    assert torch.autograd.grad(loss, weight)[0].isfinite().all()


@pytest.mark.parametrize(("name", "step"), [*((name, "choose") for name in SINGLE), ("uniform", "masses")])
def test_under_autocast_methods_compute_in_float32(name, step, monkeypatch):
    """With what the model has computed in half precision: products of tokens that are alike would be equal in it."""
    stage, calls, stock = schedule(name, "clip").stages[0], [], getattr(selection, step)
    monkeypatch.setattr(selection, step, lambda *given: calls.append((given, stock(*given))) or calls[-1][1])
    with torch.autocast("cpu", torch.bfloat16):
        kept("clip", "sdpa", Schedule([replace(stage, mass=step == "masses")]), BATCH)
    for given, found in calls:
        for number in range(len(found)) if step == "choose" else ():
            given[-1](number).known.clear()
        assert all(map(torch.equal, found, stock(*given)))


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("name", SINGLE)
def test_an_image_that_is_no_numbers_gives_an_answer_that_is_none(name, value, monkeypatch):
    """As unpruned: methods choose anything among such tokens, some of them one token nine times. Others' rows stay."""
    plan, model, whole = schedule(name, "clip"), MODELS["clip", "sdpa"], Schedule([])
    projector = model.model.multi_modal_projector

    def logits(schedule):
        with schedule(model):
            return model(**BATCH).logits[:, -1]

    def damaged(features, stock=projector.forward):
        out = stock(features)
        out[0, 7] = value if len(out) == 3 else out[0, 7]  # `downsample` encodes each of the three once more
        return out

    sound = logits(plan)
    monkeypatch.setattr(projector, "forward", damaged)
    assert logits(whole)[0].isnan().all()
    first, second = logits(plan)
    assert first.isnan().all() and torch.equal(second, sound[1])


class NoSync(TorchDispatchMode):
    """Fails on what makes the host wait for an accelerator, as seen on one.

    Numbers read from tensors, results of unknown size, and numbers assigned to places that a tensor names.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert func.overloadpacket not in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal)
        if func.overloadpacket is aten.index:
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        assert func.overloadpacket is not aten.index_put_ or args[2].dim()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("name", sorted(name for name in SINGLE if not METHODS[name].adaptive and name != "s2prune"))
def test_no_method_waits_for_the_device(name, tower, monkeypatch):
    watch(monkeypatch, selection, "choose")
    kept(tower, "sdpa", schedule(name, tower), BATCH)


@pytest.mark.parametrize("mass", [True, "distance"])
def test_mass_does_not_wait_for_the_device(mass, monkeypatch):
    watch(monkeypatch, Forward, "prune")
    watch(monkeypatch, Viewer, "_mask")
    watch(monkeypatch, Viewer, "_far")
    stages = [Stage(0, KEEP, METHODS["divprune"](), mass), Stage(2, 3, METHODS["random"](), mass)]
    kept("clip", "sdpa", Schedule(stages), BATCH)


VIEWS = {
    "alias", "as_strided", "detach", "diagonal", "empty", "expand", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Counter of the operators that change or make values: on an accelerator each is a kernel for the host to say."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_further_image_takes_few_kernels():
    """Of a batch, what does not differ between images is done once: a host that says a prefill slowly is its limit."""
    model, plan, counts = MODELS["clip", "sdpa"], schedule("codebook", "clip"), {}
    for images in 2, 10:
        inputs = prompt(model, [["image", 7, 8]] * images)
        for pruned in False, True:
            with plan(model) if pruned else contextlib.nullcontext(), Counted() as counted:
                model(**inputs)
            counts[pruned, images] = counted.count
    of_stock, of_pruned = (counts[pruned, 10] - counts[pruned, 2] for pruned in (False, True))
    assert of_pruned - of_stock <= 8 * 30


def watch(monkeypatch, owner, name):
    method = getattr(owner, name)

    def watched(*args):
        with NoSync():
            return method(*args)

    monkeypatch.setattr(owner, name, watched)
