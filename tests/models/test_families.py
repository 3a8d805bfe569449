"""Every family: a part of the compatibility table, keeping everything, leaving the context, maps, quotas."""

import contextlib
import random
import sys

import pytest
import torch

from codebook import models
from codebook.errors import CodebookError
from codebook.models.base import decoder
from codebook.pruning import Cls, FastV, Random, Schedule, Stage, Uniform
from codebook.pruning.engine import kernels
from tests.models.cells import BLOCK, DOCS, Cell, cells, check, expected, model, table
from tests.models.families import FAMILIES

SAMPLE = [
    ("features", "sdpa", "padded", "several", "keep"),
    ("attention", "eager", "padded", "image", "compact"),
    ("tower", "eager", "one", "several", "keep"),
    ("tower", "sdpa", "padded", "video", "keep"),
    ("attention", "sdpa", "one", "video", "keep"),
    ("merging", "sdpa", "padded", "several", "keep"),
    ("drop", "sdpa", "one", "image", "compact"),
    ("mass", "sdpa", "padded", "several", "keep"),
    ("mass", "eager", "padded", "image", "compact"),
]
ROWS = [["image", 5, 6, 7], [3, "large", 9, "image", 8, 11, 12]]
VIDEOS = [name for name, tiny in FAMILIES.items() if tiny.videos]


@pytest.fixture(params=FAMILIES)
def tiny(request):
    return FAMILIES[request.param]


@pytest.mark.parametrize("dimensions", SAMPLE, ids="-".join)
def test_generate_equals_masked_reference(tiny, dimensions):
    cell = Cell(tiny.name, *dimensions)
    assert check(cell) == expected(cell)


@pytest.mark.skipif(len(FAMILIES) < len(models.FAMILIES), reason="an old transformers has fewer families")
def test_the_documented_table_is_what_is_expected_of_every_cell():
    assert BLOCK.search(DOCS.read_text())[0] == table({cell: expected(cell) for cell in cells()})


@pytest.mark.filterwarnings("ignore:flex_attention called", "ignore:_compile flag", "ignore:.torch.jit.script_method")
@pytest.mark.parametrize("cell", [("attention", "several"), ("mass", "image"), ("mass", "video")], ids="-".join)
@pytest.mark.parametrize("name", [name for name, tiny in FAMILIES.items() if tiny.flexible])
def test_generate_under_flex_attention_equals_masked_reference(name, cell, monkeypatch):
    """Uncompiled: compiled for CPUs, torch's kernel ends the process."""
    monkeypatch.setitem(kernels.ATTENTION, "cpu", kernels.ATTENTION["cuda"])
    method, show = cell
    with torch.compiler.set_stance("force_eager"):
        found = check(Cell(name, method, "flex_attention", "padded", show, "keep"))
    assert found == ("none" if show == "video" and name not in VIDEOS else "works")


# Every run checks this many of all cells, drawn once and for all.
DRAWN = set(random.Random(0).sample(list(cells()), 150))


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=() if cell in DRAWN else pytest.mark.table) for cell in cells()], ids=str
)
def test_every_cell(cell):
    assert check(cell) == expected(cell)


def state(module):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [
        (name, type(m), sorted(vars(m)), [list(getattr(m, hook)) for hook in hooks])
        for name, m in module.named_modules()
    ]


@torch.no_grad()
def test_keeping_everything_is_the_untouched_model_and_leaving_restores_it(tiny):
    target, inputs = model(tiny.name, "sdpa"), tiny.inputs(ROWS)
    plain = target(**inputs).logits  # stock code installs its own capture hooks at the first forward
    text = target.generate(**inputs, max_new_tokens=4, do_sample=False)
    before, config = state(target), repr(target.config)
    with Schedule([Stage(0, 1.0, Random(), mass=True), Stage(2, 1.0, Uniform())])(target):
        assert torch.equal(target(**inputs).logits, plain)
        assert torch.equal(target.generate(**inputs, max_new_tokens=4, do_sample=False), text)
    with pytest.raises(KeyError), Schedule([Stage(1, 0.5, Random())])(target):
        pruned = target(**inputs).logits
        raise KeyError
    assert (pruned - plain).abs().max() > 0.1  # the control
    assert state(target) == before and repr(target.config) == config
    assert torch.equal(target(**inputs).logits, plain)


@torch.no_grad()
def test_a_row_keeps_the_same_tokens_alone_and_in_a_batch(tiny):
    target, schedule = model(tiny.name, "sdpa"), Schedule([Stage(0, 0.5, Random()), Stage(2, 5, Random())])

    def kept(inputs):
        with schedule(target) as pruning:
            target.generate(**inputs, max_new_tokens=1)
        return pruning.kept

    together = kept(tiny.inputs(ROWS))
    alone = kept(tiny.inputs(ROWS[:1]))
    assert all(torch.equal(a, b) for a, b in zip(alone[0], together[0], strict=True))
    if tiny.name == "llama4":  # stock Llama 4 takes no images beside beams
        return
    beams = tiny.inputs(ROWS)
    with schedule(target) as pruning:
        target.generate(**beams, max_new_tokens=2, num_beams=2)
    expected = [together[i] for i in (0, 0, 1, 2, 1, 2)]
    assert [[x.tolist() for x in stages] for stages in pruning.kept] == [[x.tolist() for x in s] for s in expected]


@torch.no_grad()
def test_quotas_are_divided_among_crops_and_frames(tiny):
    target = model(tiny.name, "sdpa")
    rows = [["large", 5, 6]] if not tiny.videos else [["video", 5, 6], [3, "large", 7]]
    with Schedule([Stage(0, 0.5, Random()), Stage(1, 5, Random())])(target) as pruning:
        target(**tiny.inputs(rows))
    for image, stages in zip(pruning.images, pruning.kept, strict=True):
        sizes = [grid.count for grid in image.layout.grids]
        for index, total in zip(stages, (round(image.count * 0.5), 5), strict=True):
            found = [image.locate(i)[0] for i in index.tolist()]
            counts = [found.count(g) for g in range(len(sizes))]
            assert sum(counts) == total
            assert all(abs(count - total * size / image.count) < 1 for count, size in zip(counts, sizes, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", VIDEOS)
def test_frames_may_share_one_budget(name):
    target, inputs = model(name, "sdpa"), FAMILIES[name].inputs([["video", 5, 6]])
    stages = [Stage(0, 0.5, Random())]
    with Schedule(stages)(target) as pruning:
        target(**inputs)
    each, video = pruning.kept[0][0].tolist(), pruning.images[0]
    with Schedule(stages, quotas="shared")(target) as pruning:
        target(**inputs)
    shared = pruning.kept[0][0].tolist()
    assert len(each) == len(shared) == round(video.count / 2) and each != shared
    scores = Random().score(_tokens(target, inputs, stages, "shared"))
    assert shared == scores.topk(len(shared)).indices.sort().values.tolist()


def _tokens(target, inputs, stages, quotas):
    """What the pruner of the first stage was given."""
    seen = []

    class Look(Random):
        def score(self, tokens):
            seen.append(tokens)
            return super().score(tokens)

    stage = Stage(stages[0].layer, stages[0].keep, Look())
    with Schedule([stage], quotas=quotas)(target):
        target(**inputs)
    return seen[0]


@torch.no_grad()
def test_grids_of_different_shapes_cannot_share_a_budget():
    target, tiny = model("llava_next", "sdpa"), FAMILIES["llava_next"]
    schedule = Schedule([Stage(0, 0.5, Random())], quotas="shared")
    with schedule(target), pytest.raises(CodebookError, match="quotas='each'"):
        target(**tiny.inputs([["image", 5]]))


@contextlib.contextmanager
def noted(target):
    """The calls that encoded what the prompts show, as they reach the family."""
    calls, pixels = [], type(models.family(target)).pixels

    def watched(self, model, call):
        calls.extend([] if call in calls else [call])
        return pixels(self, model, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(models.family(target)), "pixels", watched)
        yield calls


@torch.no_grad()
def test_patches_become_tokens_as_in_the_model(tiny):
    """Rows and columns of patches, packed, are those of tokens: even steps down and across each grid."""
    target, family = model(tiny.name, "sdpa"), models.family(model(tiny.name, "sdpa"))
    schedule = Schedule([Stage(0, 0.5, Random())])
    for rows in [["large", 5]], *([[["video", 5]]] if tiny.videos else []):
        inputs = tiny.inputs(rows)
        with noted(target) as calls, schedule(target) as pruning:
            target.generate(**inputs, max_new_tokens=1)
            [call] = calls
        [image] = pruning.images
        values = [at.float() for at in places(tiny, target, call)]
        pieces = family.pack(target, call, values)
        if (stock := merged(tiny, target, values)) is not None:
            assert torch.equal(torch.stack(pieces), stock)
        packed = torch.cat(pieces)
        for grid in image.layout.grids:
            values = packed[grid.index].view(grid.rows, grid.cols, -1)
            assert all((values[..., axis].diff(dim=axis) > 0).all() for axis in (0, 1))
            assert (values[..., 0].diff(dim=1).abs() < 1e-3).all() and (values[..., 1].diff(dim=0).abs() < 1e-3).all()


SHUFFLED = {"internvl", "aya_vision", "cohere2_vision", "idefics3", "smolvlm", "gemma3", "llama4"}


def merged(tiny, target, values):
    """Where a family shuffles or pools patches by its own function: the average of each token's patches by that."""
    if tiny.name not in SHUFFLED:
        return None
    patches, side = torch.stack(values), int(len(values[0]) ** 0.5)
    if tiny.name == "internvl":
        return target.model.pixel_shuffle(patches.unflatten(1, (side, side))).flatten(1, 2).unflatten(2, (4, 2)).mean(2)
    if tiny.name in ("aya_vision", "cohere2_vision"):
        shuffled = target.model.multi_modal_projector.pixel_shuffle(patches)
        return shuffled.flatten(1, 2).unflatten(2, (4, 2)).mean(2)
    if tiny.name in ("idefics3", "smolvlm"):
        return target.model.connector.pixel_shuffle(patches, 2).unflatten(2, (4, 2)).mean(2)
    if tiny.name == "llama4":
        from transformers.models.llama4.modeling_llama4 import pixel_shuffle

        return pixel_shuffle(patches, 0.5).unflatten(2, (4, 2)).mean(2)
    squares = patches.transpose(1, 2).unflatten(2, (side, side))
    return target.model.multi_modal_projector.avg_pool(squares).flatten(2).transpose(1, 2)


def places(tiny, target, call):
    """For each row, frame or image of the tower, row and column (N, 2) of each of its patches, by stock rules.

    Crops are numbered on in the grid that they make together.
    """
    if "grid_thw" in " ".join(call.given):
        from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

        config = target.config.vision_config
        grid = call.given[f"{call.kind}_grid_thw"]
        # Some towers take the patches line by line, the others those of a token together.
        position = get_vision_position_ids(
            grid, 1 if tiny.name in ("paddleocr_vl", "kimi_k25") else config.spatial_merge_size
        )
        if hasattr(config, "window_size"):
            index, _ = get_vision_window_index(grid, 2, config.window_size, config.patch_size)
            position = position.view(-1, 4, 2)[index].flatten(0, 1)
        return list(position.split([int(h * w) for t, h, w in grid for _ in range(t)]))
    if "spatial_shapes" in call.given:
        return [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in call.given["spatial_shapes"]]
    sizes = "target_sizes" if call.kind == "image" else "target_sizes_videos"
    if sizes in call.given:  # of MiniCPM, in squares that the tower has merged
        sides = call.given[sizes] // (tiny.merge // 2)
        return [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in sides]
    if (at := call.given.get(f"{call.kind}_position_ids")) is not None:
        return [own[(own >= 0).all(-1)].flip(-1) for own in at]
    side = tiny.patches

    def raster(rows, cols):
        return torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1).flatten(0, 1)

    if tiny.name == "mistral3":
        return [raster(height // 4, width // 4) for height, width in call.given["image_sizes"].tolist()]
    at = raster(side, side)
    pixels = call.given.get("pixel_values", call.given.get("pixel_values_videos"))
    count = pixels.shape[0] if pixels.dim() in (3, 4) else pixels.shape[0] * pixels.shape[1]
    out = [at.clone() for _ in range(count)]
    if tiny.crops and call.kind == "image":
        out[2][:, 0] += side  # the second crop is below the first
    if tiny.name == "molmo2" and call.kind == "image":
        out[2][:, 1] += side - 2  # the second crop is right of the first, of which it shows two columns again
    return out


@torch.no_grad()
def test_tower_scores_are_the_stock_attention_of_the_patches(tiny, monkeypatch):
    """Weights as the stock eager function returns them, averaged over heads and queries, or of [CLS], then packed."""
    if not tiny.tower:
        pytest.skip("it has no vision tower")
    target = model(tiny.name, "eager")
    family, seen, weights = models.family(target), [], []
    attention = family.vision_attention(target)
    module = sys.modules[type(attention).__module__]
    function = "vision_eager_attention_forward" if tiny.name == "llama4" else "eager_attention_forward"
    stock = getattr(module, function)

    def watched(owner, *args, **kwargs):
        out = stock(owner, *args, **kwargs)
        if owner in family.vision_attentions(target):
            weights.extend(out[1].mean(1))
        return out

    class Look(Cls):
        def score(self, tokens):
            seen.append(super().score(tokens))
            return seen[-1]

    monkeypatch.setattr(module, function, watched)
    if function != "eager_attention_forward":  # a tap calls the one that all modules have
        monkeypatch.setattr(module, "eager_attention_forward", watched)
    rows = [["large", 5, 6]] if not tiny.videos else [[3, "video", 7]]
    with noted(target) as calls, Schedule([Stage(0, 0.5, Look())])(target) as pruning:
        target(**tiny.inputs(rows))
        [call] = calls
    if call.given.get("pixel_attention_mask") is not None:  # rows of the tower are padded
        own = call.given["pixel_attention_mask"].sum(1)
        weights = [w[:count, :count] for w, count in zip(weights, own, strict=True)]
    if tiny.name == "llama4":  # [CLS] is the last
        weights = [w.roll(1, 0).roll(1, 1) for w in weights]
    scores = [w[0, 1:] if family.has_cls(target) else w.mean(0) for w in weights]
    packed = torch.cat(family.pack(target, call, [score[:, None] for score in scores]))[:, 0]
    for score, grid in zip(seen, pruning.images[0].layout.grids, strict=True):
        assert torch.allclose(score, packed[grid.index], atol=1e-6)


@torch.no_grad()
def test_attention_without_rotation_is_that_of_a_layer_that_does_not_rotate(tiny):
    target, inputs, seen = model(tiny.name, "eager"), tiny.inputs(ROWS), []
    first = next(i for i, layer in enumerate(decoder(target).layers) if hasattr(layer, "self_attn"))

    class Look(FastV):
        def score(self, tokens):
            seen.append(super().score(tokens))
            return seen[-1]

    with Schedule([Stage(first + 1, 0.5, Look(rotated=False))])(target):
        if tiny.name == "kimi_k25":  # latent attention
            with pytest.raises(CodebookError, match="cannot be taken back: use"):
                target(**inputs)
            return
        target(**inputs)

    def still(_, args, kwargs):
        given = kwargs["position_embeddings"]
        if isinstance(given, torch.Tensor):  # complex numbers
            return args, kwargs | {"position_embeddings": torch.ones_like(given)}
        cos, sin = given
        return args, kwargs | {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    handle = decoder(target).layers[first].register_forward_pre_hook(still, with_kwargs=True)
    maps = target(**inputs, output_attentions=True).attentions[0].mean(1)
    handle.remove()
    scores = iter(seen)
    for row, grids, places in tiny.columns(ROWS):
        for columns in places.split([rows * cols for rows, cols in grids]):
            assert torch.allclose(next(scores), maps[row, -1, columns], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ("mistral3", "gemma4") if name in FAMILIES])
def test_tower_attention_of_images_that_share_a_call(name):
    """Pixtral takes all images as one row, Gemma 4 pads them to the longest: scores are as for each image alone."""
    tiny, target, seen = FAMILIES[name], model(name, "sdpa"), []

    class Look(Cls):
        def score(self, tokens):
            seen.append(super().score(tokens))
            return seen[-1]

    inputs = tiny.inputs([["image", 5, "large", 6]])
    batch = [name for name in inputs if name.startswith(("pixel", "image"))]
    with Schedule([Stage(0, 0.5, Look())])(target):
        target(**inputs)
        for i, part in enumerate(("image", "large")):
            alone = tiny.inputs([[part, 5]])
            alone |= {pixels: inputs[pixels][i : i + 1] for pixels in batch}  # the very picture
            if name == "mistral3":  # without its padding
                height, width = alone["image_sizes"][0].tolist()
                alone["pixel_values"] = alone["pixel_values"][:, :, :height, :width]
            else:
                count = int((alone["image_position_ids"] >= 0).all(-1).sum())
                alone |= {pixels: alone[pixels][:, :count] for pixels in batch}
            target(**alone)
    for together, alone in zip(seen[:2], seen[2:], strict=True):
        assert torch.allclose(together, alone, atol=1e-6) and together.std() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("query,own", [("text", False), ("visual", False), ("text", True)])
def test_attention_scores_are_the_stock_maps(tiny, layer, query, own):
    target, inputs = model(tiny.name, "eager"), tiny.inputs(ROWS)
    seen = []

    class Look(FastV):
        def score(self, tokens):
            seen.append(super().score(tokens))
            return seen[-1]

    have = [not models.is_recurrent(layer) for layer in decoder(target).layers]
    asked = layer if own else layer - 1
    if not have[asked]:
        with pytest.raises(CodebookError, match="is recurrent; use layer " + ("0 or 2" if own else "1 or 3")):
            Schedule([Stage(layer, 0.5, Look(query=query, own_layer=own))])(target).__enter__()
        return
    maps = target(**inputs, output_attentions=True).attentions[sum(have[: asked + 1]) - 1].mean(1)
    with Schedule([Stage(layer, 0.5, Look(query=query, own_layer=own))])(target) as pruning:
        target(**inputs)
    scores = iter(seen)
    for image, (row, grids, places) in zip(pruning.images, tiny.columns(ROWS), strict=True):
        assert [(grid.rows, grid.cols) for grid in image.layout.grids] == grids
        for columns in places.split([rows * cols for rows, cols in grids]):
            at = -1 if query == "text" else columns[-1]
            assert torch.allclose(next(scores), maps[row, at, columns], atol=1e-6)
