"""A shared prefill continued in many ways equals a masked full forward without a cache."""

import pytest
import torch

from codebook.analysis.information import token_information, windows
from codebook.analysis.prefill import Prefill
from codebook.errors import CodebookError
from codebook.models import Grid, Image, Layout
from tests import reference
from tests.prompts import prompt
from tests.tiny import llava

N = 36
PROMPTS = {
    "text before": [5, 6, "image", 7, 8, 9],
    "image first": ["image", 7],
    "two images, text between": [5, "image", 6, 7, "image", 8, 9],
}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return llava(request.param)


def expected(model, inputs, layer, kept):
    """Logits (r, vocabulary) with `kept` (r, n) of the visual tokens from a layer on, all others masked."""
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    gone = torch.full((len(kept), inputs["input_ids"].shape[1]), 10**6)
    gone[:, visual] = torch.where(kept, 10**6, layer)
    embeds = reference.merged(model, inputs["input_ids"], inputs["pixel_values"]).expand(len(kept), -1, -1)
    with torch.no_grad():
        return reference.logits(model, embeds, inputs["attention_mask"].expand(len(kept), -1), gone)


@pytest.mark.parametrize("row", PROMPTS.values(), ids=PROMPTS.keys())
def test_variants_equal_masking_at_every_layer(model, row):
    inputs = prompt(model, [row])
    prefill = Prefill.of(model, inputs)
    n = N * row.count("image")
    kept = torch.rand(9, n, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.1, 0.9, 9)[:, None]
    kept[0], kept[1], kept[2], kept[2, 5] = False, True, True, False  # none, all, all but one
    for layer in range(4):
        ours, theirs = prefill.answers([layer] * 9, kept, batch_size=4), expected(model, inputs, layer, kept)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    mixed = prefill.answers([3, 0, 2, 1, 1, 0, 3, 2, 2], kept)
    for r, layer in enumerate([3, 0, 2, 1, 1, 0, 3, 2, 2]):
        theirs = expected(model, inputs, layer, kept[r : r + 1])[0]
        assert (mixed[r] - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_unpruned_logits_are_the_models(model):
    inputs = prompt(model, [PROMPTS["text before"]])
    with torch.no_grad():
        assert torch.equal(Prefill.of(model, inputs).logits, model(**inputs, logits_to_keep=1).logits[0, -1])


@pytest.mark.parametrize("change", [lambda x: x / 8, lambda x: 30 * (x / 30).tanh()], ids=["scale", "soft cap"])
def test_logits_that_are_changed_behind_the_head_are_refused(change):
    """Continuations do not see what the model does there, and their probabilities would be others than the whole's."""
    own = llava("sdpa")
    own.lm_head.weight.data *= 100
    own.register_forward_hook(lambda module, args, out: setattr(out, "logits", change(out.logits)))
    with pytest.raises(CodebookError, match="behind its head, as soft caps do: sweep with --metric generated"):
        Prefill.of(own, prompt(own, [PROMPTS["text before"]]))


@pytest.mark.parametrize("row", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_token_information_equals_the_masked_reference(model, row, leave_one_out):
    inputs = prompt(model, [row])
    images = row.count("image")
    target = int(
        expected(model, inputs, 0, torch.zeros(1, N * images, dtype=torch.bool)).argmax()
    )  # no label of its own
    found = token_information(
        model, inputs, [0, 2, 3], window=4, target=target, leave_one_out=leave_one_out, batch_size=5
    )
    assert found.values.shape == (3, 4 * images)  # a grid of 6 x 6: windows of 16, 8, 8 and 4 tokens
    assert sorted(map(len, found.windows)) == sorted([16, 8, 8, 4] * images)
    kept = torch.zeros(1 + 4 * images, N * images, dtype=torch.bool)
    for i, window in enumerate(found.windows, 1):
        kept[i, window] = True
    full = expected(model, inputs, 0, torch.ones(1, N * images, dtype=torch.bool)).softmax(-1)[0, target]
    for i, layer in enumerate([0, 2, 3]):
        alone = expected(model, inputs, layer, kept).softmax(-1)[:, target]
        without = expected(model, inputs, layer, ~kept[1:]).softmax(-1)[:, target]
        values = full - without if leave_one_out else alone[1:] - alone[0]
        assert values.abs().max() > 1e-4  # or the test would say nothing
        assert torch.allclose(found.values[i], values, atol=2e-6)
        assert torch.allclose(found.none[i], alone[0], atol=2e-6)
    assert found.full == pytest.approx(float(full), abs=1e-5)
    assert torch.allclose(found.variance, ((found.values - found.mean[:, None]) ** 2).mean(1))


def test_without_a_label_the_target_is_the_models_own_first_token(model):
    inputs = prompt(model, [PROMPTS["text before"]])
    found = token_information(model, inputs, [1])
    with torch.no_grad():
        assert found.target == model(**inputs).logits[0, -1].argmax()
    assert found.values.shape == (1, N)


def test_cost_is_counted_in_tokens_times_layers():
    model = llava()
    inputs = prompt(model, [[5, 6, "image", 7, 8, 9]])  # 2 + 36 + 3 tokens, 4 layers
    prefill = Prefill.of(model, inputs)
    assert (prefill.cost.processed, prefill.cost.naive) == (41 * 4, 0)
    none = torch.zeros(2, N, dtype=torch.bool)
    prefill.answers([1, 3], none)
    assert prefill.cost.processed == 41 * 4 + 3 * 3 + 3 * 1  # three tokens of text through layers 1.. and 3..
    assert prefill.cost.naive == (41 * 1 + 5 * 3) + (41 * 3 + 5 * 1)


def test_windows_are_squares_of_the_grid_cut_off_at_its_edges():
    def image(*grids):
        return Image("image", Layout(99, tuple(Grid(0, rows, cols) for rows, cols in grids)), tuple(range(99)))

    assert windows([image((2, 3))], 2) == [[0, 1, 3, 4], [2, 5]]
    assert windows([image((1, 2)), image((2, 1))], 1) == [[0], [1], [2], [3]]
    assert windows([image((1, 2), (2, 2))], 2) == [[0, 1], [2, 3, 4, 5]]


def test_hooks_are_gone_and_the_model_unchanged():
    model = llava()
    inputs = prompt(model, [PROMPTS["image first"]])
    with torch.no_grad():
        before = model(**inputs).logits
        token_information(model, inputs, [2])
        assert torch.equal(model(**inputs).logits, before)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.get_decoder().layers)


def test_what_cannot_be_continued_is_refused():
    model = llava()
    with pytest.raises(CodebookError, match="one row"):
        Prefill.of(model, prompt(model, [["image", 7], ["image", 8]]))
    with pytest.raises(CodebookError, match="put text after"):
        Prefill.of(model, prompt(model, [[7, "image"]]))
    with pytest.raises(CodebookError, match="shows no image"):
        Prefill.of(model, {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])})
    with pytest.raises(CodebookError, match="layers from 0 to 3"):
        token_information(model, prompt(model, [["image", 7]]), [4])
    with pytest.raises(CodebookError, match="window of 0"):
        token_information(model, prompt(model, [["image", 7]]), window=0)
    hook = model.get_decoder().layers[2].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    with pytest.raises(CodebookError, match="between its decoder layers"):
        Prefill.of(model, prompt(model, [["image", 7]]))
    hook.remove()
