"""Molmo 2: one block of all image tokens, layers of two kinds of positions, norms behind layers, whole views alone."""

import functools

import pytest
import torch

from codebook import models
from codebook.building.probes import split_prompt
from codebook.models import loading
from codebook.pruning import DivPrune, FastV, Random, Schedule, Stage
from tests import reference
from tests.models import cells
from tests.models.cells import Cell, gone_from, mass, model
from tests.models.configs import molmo2
from tests.models.families import FAMILIES
from tests.models.processors import TinyProcessor
from tests.models.prompts import GLOBAL, NEWLINE, SEPARATOR
from tests.tiny import IMAGE

NAME, END = "molmo2", 93
pytestmark = pytest.mark.skipif(NAME not in FAMILIES, reason="it needs a newer transformers")
ROWS = [["image", 5, 6, 7], [3, "large", 9, "image", 8, 11, 12]]
SCHEDULE = Schedule([Stage(0, 0.5, DivPrune(), mass=True), Stage(2, 0.25, Random(), mass=True)])


@pytest.fixture
def olmo(monkeypatch):
    """The variant on Olmo: norms behind layers, and over all heads; layers of the tower counted from the last."""
    variant = type(FAMILIES[NAME])(
        NAME, functools.partial(molmo2, norm_after=True, qk_norm_type="olmo"), FAMILIES[NAME].cls, videos=True
    )
    made = variant.make()
    made.config.adapter_config.vision_feature_layer = [-1, 0]
    for layer in made.get_decoder().layers:  # of equal weights, a second norm would change nothing
        layer.input_layernorm.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(cells, "model", lambda *_: made)
    return made


@torch.no_grad()
@pytest.mark.parametrize("cell", [("attention", "several", "compact"), ("mass", "video", "keep")], ids="-".join)
def test_the_variant_with_norms_behind_layers(olmo, cell):
    method, show, positions = cell
    assert cells.check(Cell(NAME, method, "sdpa", "padded", show, positions)) == "works"
    assert models.family(olmo).layer(olmo) == 3


@torch.no_grad()
def test_a_layer_that_is_asked_itself_is_given_no_norm_where_norms_stand_behind(olmo):
    inputs, seen = FAMILIES[NAME].inputs(ROWS[:1]), []

    class Look(FastV):
        def score(self, tokens):
            seen.append(super().score(tokens))
            return seen[-1]

    with Schedule([Stage(1, 0.5, Look(own_layer=True))])(olmo):
        olmo(**inputs)
    olmo.set_attn_implementation("eager")
    maps = olmo(**inputs, output_attentions=True).attentions[1].mean(1)
    [(_, _, columns)] = FAMILIES[NAME].columns(ROWS[:1])
    assert torch.allclose(seen[0], maps[0, -1, columns], atol=1e-6)


@torch.no_grad()
def test_a_further_turn_is_causal_whatever_its_types():
    """As in the stock class, whose block is of the first forward alone."""
    target, tiny = model(NAME, "sdpa"), FAMILIES[NAME]
    inputs, more = tiny.inputs(ROWS), torch.tensor([[25, NEWLINE, 27, NEWLINE, 29], [30, NEWLINE, 32, NEWLINE, 34]])
    whole, positions = reference.followed(inputs, more)
    with SCHEDULE(target) as pruning:
        cache = target(**inputs, position_ids=positions[:, :-5], use_cache=True).past_key_values
        now = {"input_ids": more, "attention_mask": whole["attention_mask"], "position_ids": positions[:, -5:]}
        types = tiny.types(whole["input_ids"])
        ours = target(**now, **types, mm_encoder_outputs={}, past_key_values=cache).logits[:, -1]
    given = tiny.columns(ROWS), pruning.kept, SCHEDULE.stages
    _, theirs = reference.masked(target, whole, gone_from(whole, *given), mass=mass(*given))
    assert (ours - theirs[:, 0]).abs().max() <= 2e-5 * theirs.abs().max()


def test_a_prompt_that_probes_whole_views_has_no_crops():
    """Its processor always makes crops, with text around them: the prompt is that of a view alone."""
    before, row_end, after = split_prompt(model(NAME, "sdpa"), TinyProcessor(NAME), "it")
    assert before[-1] == SEPARATOR and row_end == [NEWLINE] and after[:2] == [NEWLINE, END]
    assert not {IMAGE, GLOBAL} & {*before, *after} and after[2:] == [22, 29]


def test_its_processor_marks_images_by_several_tokens():
    processor = TinyProcessor(NAME)
    processor.image_token_id, processor.image_token_ids = 50, [IMAGE, NEWLINE, SEPARATOR]
    loading._check_processor("it", model(NAME, "sdpa"), processor)
