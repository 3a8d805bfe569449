"""Models that no file describes: what the test of them finds, what it refuses, and what is then pruned right."""

import re

import pytest
import torch
import transformers as hf

import codebook
from codebook import models
from codebook.errors import CodebookError
from codebook.models import trial
from codebook.models.generic import Around, Belief, Generic, Unproven
from codebook.pruning import Cls, DivPrune, FarthestPoint, FastV, Random, Schedule, Stage
from tests import reference
from tests.models import cells
from tests.models.cells import Cell, model
from tests.models.families import FAMILIES
from tests.models.newcomers import NEWCOMERS
from tests.models.pictured import Pictured
from tests.tiny import IMAGE, PAD, SIDE, llava

REFUSED = {
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), "are the rows and columns of no grid"),
    **dict.fromkeys(("idefics3", "smolvlm"), "are the rows and columns of no grid"),
    **dict.fromkeys(
        ("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker", "cosmos3_omni", "granite4_vision"),
        "something is added to hidden states between its decoder's layers",
    ),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_moe", "lfm2_vl", "lfm3_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"),
        "its decoder has layers without attention",
    ),
    **dict.fromkeys(
        ("gemma3", "gemma4_unified", "paligemma", "molmo2"), "tokens of its prompts do not see just those before them"
    ),
    "llama4": "chunked_attention layers, which nobody has checked",
    "ernie4_5_vl_moe": "layers are given moe_mm_token_type_ids for each token",
    "gemma4": "layers are given more than hidden states by position",
    "gemma4_e2b": "layers that share keys and values",
}
"""Families of which a file of their own knows more than the generic one, and what the test says."""
CROPPED = ("internvl", "aya_vision", "cohere2_vision", "ovis2")
FOUND = [name for name in FAMILIES if name not in REFUSED]


@pytest.fixture(autouse=True, scope="module")
def small():
    """Pictures that are large enough for these models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "TEST_SHAPES", ((3, 5), (4, 2)))
        yield


@pytest.fixture
def forgotten(monkeypatch):
    """A family whose own file nobody knows, and its tiny model, which was tested."""

    def forget(name):
        target = model(name, "sdpa", "cpu")
        monkeypatch.delitem(models.FAMILIES, FAMILIES[name].family)
        if target not in trial._REPORTS:
            trial.try_model(target, Pictured(FAMILIES[name], target))
        return target

    return forget


def kept_columns(target, inputs, stages):
    """For each row the columns of its visual tokens, and of those that survive each stage; and the logits."""
    with Schedule(stages)(target) as pruning:
        logits = target(**inputs).logits
    rows, images = [], iter(zip(pruning.images, pruning.kept, strict=True))
    for image, kept in images:
        columns = torch.tensor(image.columns)[torch.cat([grid.index for grid in image.layout.grids])]
        rows.append([columns, *(columns[index] for index in kept)])
    return [torch.cat(parts) for parts in zip(*rows, strict=True)], pruning.images, logits


def grids(images):
    return [(grid.rows, grid.cols) for image in images for grid in image.layout.grids]


@torch.no_grad()
@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_is_what_its_own_file_says(name, forgotten):
    target, tiny = model(name, "sdpa", "cpu"), FAMILIES[name]
    cases = [
        ([["image", 5, 6], [3, "image", 9, "image", 8]], [Stage(0, 0.5, Random()), Stage(2, 5, FarthestPoint())]),
        ([["large", 5, 6]], [Stage(0, 0.5, DivPrune())]),
    ]
    own = [kept_columns(target, tiny.inputs(rows), stages) for rows, stages in cases]
    forgotten(name)
    found = models.family(target)
    assert isinstance(found, Generic) and found.name == name
    for (rows, stages), (columns, images, logits), whole in zip(cases, own, (True, name not in CROPPED), strict=True):
        again, others, pruned = kept_columns(target, tiny.inputs(rows), stages)
        assert all(torch.equal(a, b) for a, b in zip(columns, again, strict=True))
        assert torch.equal(logits, pruned)
        if whole:  # crops count as images of their own
            assert [(x.columns, x.layout.length) for x in images] == [(x.columns, x.layout.length) for x in others]
        assert grids(images) == grids(others)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in REFUSED])
def test_what_only_its_own_file_knows_is_refused(name, forgotten):
    target = forgotten(name)
    with pytest.raises(CodebookError, match=f"^(?!.*\n).*{re.escape(REFUSED[name])}.*; use a (family|model)"):
        models.family(target)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "gemma4" not in name])  # whose pictures are all large
def test_its_own_file_passes_the_test(name):
    target = model(name, "sdpa", "cpu")
    report = trial.try_model(target, Pictured(FAMILIES[name], target), models.family(target))
    assert report.reason is None and report.known
    assert all(shown.right == shown.grid[0] * shown.grid[1] for shown in report.shown)


@pytest.mark.parametrize("method", ["features", "mass", "merging", "drop", "attention", "tower"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "mistral3"])
def test_generate_equals_the_masked_reference(name, method, forgotten):
    forgotten(name)
    unknown = method in ("attention", "tower")
    found = cells.check(Cell(name, method, "sdpa", "padded", "several", "keep"))
    assert found == ("refused" if unknown else "works")


@pytest.mark.parametrize("name", ["llava", "kimi_k25", "qwen2_vl"])
def test_positions_are_renumbered_where_they_have_one_axis(name, forgotten):
    forgotten(name)
    found = cells.check(Cell(name, "features", "sdpa", "padded", "image", "compact"))
    assert found == ("refused" if name == "qwen2_vl" else "works")


@pytest.mark.parametrize("name", NEWCOMERS)
def test_stock_classes_that_no_file_describes(name, monkeypatch):
    monkeypatch.setitem(FAMILIES, name, NEWCOMERS[name])
    target = model(name, "sdpa", "cpu")
    report = trial.try_model(target, Pictured(NEWCOMERS[name], target))
    assert report.reason is None and not report.known
    assert cells.check(Cell(name, "mass", "sdpa", "padded", "several", "keep")) == "works"
    assert cells.check(Cell(name, "attention", "sdpa", "padded", "several", "keep")) == "refused"


class UnseenConfig(hf.LlavaConfig):
    model_type = "unseen"


class Unseen(hf.LlavaForConditionalGeneration):
    """LLaVA by another name, whose features go through a function."""

    config_class = UnseenConfig


def unseen(change=lambda features: features):
    stock = llava()
    settings = stock.config.to_dict()
    del settings["model_type"]
    made = Unseen(UnseenConfig(**settings)).eval()
    made.load_state_dict(stock.state_dict())
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = PAD, None
    encode = made.model.get_image_features

    def changed(pixel_values, **options):
        out = encode(pixel_values=pixel_values, **options)
        out.pooler_output = tuple(change(torch.stack(list(out.pooler_output))))
        return out

    made.model.get_image_features = changed
    return made


def examined(target, known=None):
    processor = Pictured(FAMILIES["llava"], target)
    return codebook.check_model(target, processor) if known is None else trial.try_model(target, processor, known)


def with_newlines(before):
    """A structural token after, or before, each row."""

    def change(features):
        rows = features.unflatten(1, (SIDE, SIDE))
        newline = torch.full_like(rows[:, :, :1], 0.3)
        return torch.cat([newline, rows] if before else [rows, newline], dim=2).flatten(1, 2)

    return change


@torch.no_grad()
@pytest.mark.parametrize("newlines", [False, True], ids=["plain", "newlines"])
def test_a_model_type_that_nobody_knows(newlines):
    target = unseen(with_newlines(False)) if newlines else unseen()
    with pytest.raises(CodebookError, match=r"type unseen are described by no file.*codebook.check_model\(model"):
        Schedule([Stage(0, 0.5, DivPrune())])(target)
    report = examined(target)
    assert report.reason is None and report.token == IMAGE and not report.known
    assert [shown.structural for shown in report.shown] == [SIDE * newlines]
    length = SIDE * (SIDE + newlines)
    pixels = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[PAD, 5, *[IMAGE] * length, 7, 8], [4, 3, *[IMAGE] * length, 9, 11]])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}
    schedule = Schedule([Stage(0, 0.5, DivPrune()), Stage(2, 7, Random())])
    with schedule(target) as pruning:
        out = target.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True,
                              output_logits=True, suppress_tokens=[IMAGE])  # fmt: skip
    place = torch.arange(length).view(SIDE, SIDE + newlines)[:, :SIDE].flatten() + 2  # newlines are never dropped
    gone = torch.full(ids.shape, 10**6)
    for row, stages in enumerate(pruning.kept):
        for stage, index in reversed(list(zip(schedule.stages, stages, strict=True))):
            dropped = torch.ones(SIDE * SIDE, dtype=torch.bool)
            dropped[index] = False
            gone[row, place[dropped]] = stage.layer
    said = out.sequences[:, ids.shape[1] :]
    tokens, logits = reference.masked(target, inputs, gone, said, suppress=[IMAGE])
    assert torch.equal(said, tokens)
    assert (torch.stack(out.logits, 1) - logits).abs().max() <= 1e-5 * logits.abs().max()


def swapped(features):
    order = torch.arange(features.shape[1])
    order[[7, 8]] = order[[8, 7]]
    return features[:, order]


def shuffled(features):
    return features[:, torch.randperm(features.shape[1], generator=torch.Generator().manual_seed(2))]


WRONG = {
    "transposed": (lambda features: features.unflatten(1, (SIDE, SIDE)).transpose(1, 2).flatten(1, 2), "30 of 36"),
    "upside down": (lambda features: features.unflatten(1, (SIDE, SIDE)).flip(1).flatten(1, 2), "36 of 36"),
    "shuffled": (shuffled, "of 36 visual tokens do not stand where their patches are"),
    "two swapped": (swapped, "2 of 36 visual tokens do not stand where"),
    "without a place": (lambda features: features.mean(1, keepdim=True) * torch.arange(1, 37)[:, None], "of 36 visual"),
    "newlines before rows": (with_newlines(True), "change with no picture"),
    "blind": (lambda features: torch.ones_like(features), "36 of 36 image tokens change with no picture"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_features_in_another_order_are_refused(wrong):
    change, why = WRONG[wrong]
    target = unseen(change)
    report = examined(target)
    assert report.family is None and why in report.reason and "\n" not in report.reason
    with pytest.raises(CodebookError, match=re.escape(why)):
        Schedule([Stage(0, 0.5, DivPrune())])(target)


@pytest.mark.parametrize("order", [[6, 5, 4, 3, 2, 1, 0], [0, 1, 3, 2, 4, 5, 6], [0, 1, 5, 3, 4, 2, 6]])
def test_crops_in_another_order_are_refused(order):
    """Also where the first two and the last are in their places."""
    tiny = FAMILIES["internvl"]
    target = tiny.make()
    encode, processor = target.model.get_image_features, Pictured(tiny, target)

    def turned(pixel_values, **options):
        out = encode(pixel_values=pixel_values, **options)
        if options.get("return_dict") and len(pixel_values) == 7:  # crops of one picture, and its whole view
            out.pooler_output = out.pooler_output[order]
        return out

    target.model.get_image_features = turned
    report = trial.try_model(target, processor)
    assert "crops do not come in the order of their pixels" in report.reason


@torch.no_grad()
@pytest.mark.parametrize(("name", "sizes"), [("lfm2_vl", "spatial_shapes"), ("qwen2_vl", "image_grid_thw")])
def test_crops_with_sizes_of_their_own(name, sizes, monkeypatch):
    """Rows of pixels for each crop, padded, and one row of all patches: in order, and two in each other's place."""
    target, tiny = model(name, "sdpa", "cpu"), FAMILIES[name]
    inputs = tiny.inputs([["image", 5, "image", 6, "image", 7, "image"]])
    family = Generic(name, Belief(sizes, 2), "vision_tower", "multi_modal_projector", 1)
    lengths = [family.belief.layout(*size).length for size in family.belief.encoded_sizes(inputs)]
    assert len(lengths) == 4 and sum(lengths) == int((inputs["input_ids"] == IMAGE).sum())
    trial._test_crops(target, family, inputs, lengths)
    encode = target.model.get_image_features

    def turned(pixel_values, *given, **options):
        return encode(pixel_values.reshape(4, -1)[[0, 2, 1, 3]].view_as(pixel_values), *given, **options)

    monkeypatch.setattr(target.model, "get_image_features", turned)
    with pytest.raises(Unproven, match="crops do not come in the order"):
        trial._test_crops(target, family, inputs, lengths)


def test_newlines_that_are_misread_are_refused():
    target = unseen(with_newlines(False))
    for belief, why in (
        (Belief(grid=(6, 7), shape=(3, 24, 24)), "6 of 42 image tokens change with no picture, where 0 were believed"),
        (Belief(grid=(7, 5), shape=(3, 24, 24), around=Around(newline=1)), "change with no picture"),
        (Belief(grid=(6, 6), shape=(3, 24, 24)), "a run of 42 image tokens is not a multiple of 36"),
    ):
        family = Generic("unseen", belief, "vision_tower", "multi_modal_projector", 1)
        assert why in examined(target, family).reason


def test_a_grid_that_is_permuted_in_a_familys_file_is_refused():
    class Turned(type(models.FAMILIES["qwen2_vl"])):
        def sizes(self, model, encoded):
            return [(frames, cols, rows) for frames, rows, cols in super().sizes(model, encoded)]

    target = model("qwen2_vl", "sdpa", "cpu")
    report = trial.try_model(target, Pictured(FAMILIES["qwen2_vl"], target), Turned())
    assert "visual tokens do not stand where their patches are" in report.reason


def test_nothing_is_disturbed_and_nothing_is_run_twice(monkeypatch):
    target = unseen()
    target.train()
    target.model.vision_tower.eval()
    modes, drawn = [module.training for module in target.modules()], torch.get_rng_state()
    examined(target)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.get_decoder().layers]
    assert not any(hooks) and "get_image_features" in vars(target.model)  # the one of this file
    assert [module.training for module in target.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)
    monkeypatch.setattr(trial, "_test", None)
    assert models.family(target) is models.family(target)
    again = trial._REPORTS[target].shown
    del trial._REPORTS[target]
    monkeypatch.undo()
    assert examined(target).shown == again


@torch.no_grad()
def test_what_is_not_known_is_refused_by_name(forgotten):
    target, tiny = forgotten("qwen2_vl"), FAMILIES["qwen2_vl"]
    for stage, why in ((Stage(1, 0.5, FastV()), "methods that need attention"), (Stage(0, 0.5, Cls()), "vision tower")):
        with pytest.raises(CodebookError, match=f"{why}.* not known for models of type qwen2_vl.*: use one"):
            Schedule([stage])(target).__enter__()
    plain = Schedule([Stage(0, 0.5, DivPrune())])
    with plain(target), pytest.raises(CodebookError, match=r"videos are not known.*frames as images"):
        target(**tiny.inputs([["video", 5]]))
    with pytest.raises(CodebookError, match=r"codebooks of it are not known.*use a method without one"):
        models.family(target).view(None, None)
    target = forgotten("llava")
    larger = models.Encoded("image", {"pixel_values": torch.zeros(1, 3, 48, 24)})
    with pytest.raises(CodebookError, match=r"3 x 48 x 24 pixels were not tested.*3 x 24 x 24: use"):
        models.family(target).layouts(target, "image", [[IMAGE] * 72 + [5]], larger)
