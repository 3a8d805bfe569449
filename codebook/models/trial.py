"""The test of a model whose family no file describes: pictures with known patches, and where they come out.

A grid that is transposed, features that are shuffled, newlines that are misread and tokens that show no place at all
are told apart.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from codebook.errors import CodebookError, named_line, quoted
from codebook.models.base import Family, Model, Processor, patch_side
from codebook.models.coded import cell_scores, coded_pictures, plain_picture, still_tokens
from codebook.models.decoding import position_axes
from codebook.models.encoded import Encoded
from codebook.models.entering import Entered, enter_decoder, projector_path, prompt_inputs, show, tower_path
from codebook.models.generic import AROUND, Belief, Generic, Unproven, image_token
from codebook.models.layout import Grid, Layout

TEST_SHAPES = ((6, 10), (9, 5))
"""Rows and columns of tokens of the pictures that are shown, where the processor leaves pictures their size."""

LARGE = 3
"""How many times larger, down and across, a picture is that many processors cut into crops."""

TRIES = 3
"""How often more variants are shown until each token is clear."""

BATCH = 8
"""Pictures per forward."""


@dataclass(frozen=True)
class Shown:
    """A picture that was shown, and what came of it.

    Attributes
    ----------
    size
        Height and width in pixels.
    grid
        Rows and columns of its visual tokens.
    tokens
        Image tokens in the prompt.
    structural
        How many of them change with no picture.
    right
        How many of the others stand where they are believed to.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    tokens: int
    structural: int
    right: int


@dataclass
class Report:
    """What a test found.

    Attributes
    ----------
    model_type
        The model's, from its config.
    known
        Whether a file of `codebook/models` describes it.
    family
        The family to prune it with; None if it was refused.
    token
        Id of the token of images.
    shown
        The pictures.
    reason
        Why it was refused, and what to do; None if it was not.
    """

    model_type: str
    known: bool = False
    family: Family | None = None
    token: int | None = None
    shown: list[Shown] = field(default_factory=list)
    reason: str | None = None


_REPORTS: weakref.WeakKeyDictionary[Any, Report] = weakref.WeakKeyDictionary()
_TESTING = threading.RLock()


def try_model(model: Model, processor: Processor, known: Family | None = None) -> Report:
    """Test what is believed of a stock model's images; the result is kept as long as the model lives.

    Neither the state of random numbers nor the training mode is changed.

    Parameters
    ----------
    processor
        The one that goes with the model: it makes the prompts and pixels of the test.
    known
        The family whose own file describes the model, to test that; None looks for a belief that holds.
    """
    with _TESTING, _undisturbed(model):
        report = Report(model.config.model_type, known is not None)
        try:
            report.token = image_token(model.config)
            report.family = _test(model, processor, known, report)
        except (Unproven, CodebookError) as refused:
            report.reason = _refusal_of(model.config.model_type, known, str(refused))
        except Exception as error:  # whatever a model that nobody knows may raise
            why = f"the model did not take the pictures ({named_line(error, 160)})"
            report.reason = _refusal_of(model.config.model_type, known, why)
        if known is None:
            _REPORTS[model] = report
        return report


def learned(model: Model) -> Family:
    """The generic family of a model that was tested, or is now with the processor that lies beside its weights.

    Raises
    ------
    CodebookError
        If the test refuses it, or there is no such processor.
    """
    with _TESTING:
        report = _REPORTS.get(model) or try_model(model, _processor_of(model))
    if report.family is None:
        raise CodebookError(report.reason or "")
    return report.family


def _processor_of(model: Model) -> Processor:
    """The processor in the folder that a model was loaded from; nothing is fetched."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(model.name_or_path, local_files_only=True, trust_remote_code=False)
    except Exception:  # the libraries raise a dozen types
        raise CodebookError(
            f"models of type {model.config.model_type} are described by no file of codebook and must be tested once: "
            "call codebook.check_model(model, processor) first, or load the model with codebook.load"
        ) from None


def _refusal_of(model_type: str, known: Family | None, why: str) -> str:
    if known is not None:
        return f"the test of {model_type} failed: {why}; use the processor of this very checkpoint, or report it"
    return (
        f"models of type {model_type} are described by no file of codebook, and the test of what it believes of their "
        f"images failed: {why}; use a family of docs/models.md, such as qwen3_vl"
    )


@contextlib.contextmanager
def _undisturbed(model: Model) -> Iterator[None]:
    """A context for forwards in eval mode, which leaves random numbers and training mode as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _test(model: Model, processor: Processor, known: Family | None, report: Report) -> Family:
    """The family that the test bears out."""
    axes = 1
    if known is None:
        axes = position_axes(model, prompt_inputs(model, processor, [plain_picture(_sizes(model)[0])]))
    shots = [show(model, processor, [plain_picture(size)]) for size in _sizes(model)]
    if known is not None:
        _test_order(model, processor, known, shots, report)
        return known
    if not any(_beliefs(shots)) and (size := _pixels(shots[0])) is not None:
        shots = [show(model, processor, [plain_picture(size)])]  # one that is not cut into crops
    tower = tower_path(model)
    projector = projector_path(shots[0], tower)
    first: Unproven | None = None
    for belief in _beliefs(shots):
        family = Generic(model.config.model_type, belief, tower, projector, axes)
        report.shown.clear()
        try:
            _test_order(model, processor, family, shots, report)
            _test_large(model, processor, family)
            return family
        except Unproven as refused:
            first = first or refused
    counts = " and ".join(str(shot.counts[0]) for shot in shots)
    raise first or Unproven(f"{counts} image tokens are the rows and columns of no grid that its arguments tell")


def _sizes(model: Model) -> list[tuple[int, int]]:
    """Height and width in pixels of the first pictures: of `TEST_SHAPES`, where two by two patches make a token."""
    side = 2 * patch_side(model)
    return [(rows * side, cols * side) for rows, cols in TEST_SHAPES]


# Beliefs


def _beliefs(shots: Sequence[Entered]) -> Iterator[Belief]:
    """What the tokens of single pictures may be, as far as their numbers tell."""
    given = [{} if shot.call is None else shot.call.given for shot in shots]
    lengths = [shot.counts[0] for shot in shots]
    for name, value in given[0].items():
        if not isinstance(value, Tensor) or value.is_floating_point() or value.shape not in ((1, 2), (1, 3)):
            continue
        sides = [side for one in given for side in one[name][0, -2:].tolist()]
        pixels = all(tuple(one["pixel_values"].shape[-2:]) == tuple(one[name][0, -2:].tolist()) for one in given)
        whole = math.gcd(*sides)
        for unit, around in product(range(1, whole + 1), AROUND):
            if whole % unit == 0:
                belief = Belief(name, unit, pixels, around=around)
                layouts = [belief.layout(*belief.encoded_sizes(one)[0]) for one in given]
                if [layout.length for layout in layouts] == lengths:
                    yield belief
    shapes = {tuple(one["pixel_values"].shape) if "pixel_values" in one else () for one in given}
    [shape, *others] = shapes
    if others or len(set(lengths)) > 1 or len(shape) != 4 or shape[0] != 1:
        return
    height, width = shape[-2:]
    for around in AROUND:
        inner = lengths[0] - around.head - around.tail
        for rows in range(1, inner + 1):
            cols = inner // rows - around.newline
            if inner % rows == 0 and cols > 0 and rows * width == cols * height:
                yield Belief(grid=(rows, cols), shape=shape[1:], around=around)


# Tests


def _test_order(model: Model, processor: Processor, family: Family, shots: Sequence[Entered], report: Report) -> None:
    """Test number, grid and order of the tokens of pictures of each shape that the first ones came to."""
    sizes = dict.fromkeys(_own_size(model, family, shot) for shot in shots)
    report.shown.extend(_placed(model, processor, family, size) for size in sizes)


def _layout(model: Model, family: Family, shot: Entered) -> Layout:
    """The layout that a family believes the first picture to have."""
    try:
        rows = family.layouts(model, "image", shot.ids, shot.call)
    except CodebookError as error:  # its remedy is for prompts that users make
        raise Unproven(str(error).partition(": ")[0]) from None
    for found, count in zip(rows, shot.counts, strict=True):
        if [layout.length for layout in found] != [count]:
            raise Unproven(f"a picture of {count} image tokens was taken for {len(found)} others")
    return rows[0][0]


def _view(layout: Layout) -> Grid:
    """The grid of the whole picture."""
    found = next((grid for grid in layout.grids if grid.kind == "view"), None)
    if found is None:
        raise Unproven("no grid of it shows the whole picture")
    return found


def _own_size(model: Model, family: Family, shot: Entered) -> tuple[int, int]:
    """Height and width of a picture that the processor leaves its size, or nearly, so that cells are whole patches."""
    view, pixels = _view(_layout(model, family, shot)), _pixels(shot)
    return pixels or family.view_size(model, view.rows, view.cols)


def _canvas(model: Model, family: Family, view: Grid, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what a picture is cut from, so that its last cells may be smaller than the others."""
    if size != family.view_size(model, view.rows, view.cols):
        return size
    side = patch_side(model) * family.merge(model)
    return view.rows * side, view.cols * side


def _pixels(shot: Entered) -> tuple[int, int] | None:
    """Height and width of a picture's pixels, where they come as pictures."""
    pixels = shot.call.given.get("pixel_values") if shot.call is not None else None
    if not isinstance(pixels, Tensor) or pixels.dim() < 4 or pixels.shape[-3] != 3 or min(pixels.shape[-2:]) < 16:
        return None
    return pixels.shape[-2], pixels.shape[-1]


def _placed(model: Model, processor: Processor, family: Family, size: tuple[int, int]) -> Shown:
    """Show variants of a picture of a grid of cells, and compare where its tokens come out with the belief."""
    layout = _layout(model, family, show(model, processor, [plain_picture(size)]))
    view = _view(layout)
    grid, cells = (view.rows, view.cols), view.count
    score: Tensor | float = 0.0
    for seed in range(TRIES):
        pictures, codes = coded_pictures(grid, _canvas(model, family, view, size), seed)
        pictures = [picture.crop((0, 0, size[1], size[0])) for picture in pictures]
        batches = [show(model, processor, pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)]
        if any(count != layout.length for batch in batches for count in batch.counts):
            raise Unproven("pictures of one size have different numbers of tokens")
        tokens = torch.cat([batch.embeds[batch.visual].view(len(batch.ids), layout.length, -1) for batch in batches])
        still, believed = still_tokens(tokens), torch.ones(layout.length, dtype=torch.bool)
        for one in layout.grids:
            believed[one.index] = False
        if not torch.equal(still, believed):
            raise Unproven(
                f"{int(still.sum())} of {layout.length} image tokens change with no picture, where "
                f"{int(believed.sum())} were believed to, or others"
            )
        score = score + cell_scores(tokens[:, view.index], codes)
        right = int((score.argmax(1) == torch.arange(cells)).sum())
        if right == cells or right < cells / 2:
            break
    if right < cells:
        raise Unproven(f"{cells - right} of {cells} visual tokens do not stand where their patches are in the picture")
    return Shown(size, grid, layout.length, int(believed.sum()), right)


def _test_large(model: Model, processor: Processor, family: Generic) -> None:
    """Test the number of tokens of a large picture, and that crops come in the order of their pixels."""
    height, width = _sizes(model)[0]
    inputs = prompt_inputs(model, processor, [plain_picture((LARGE * height, LARGE * width))])
    count, belief = int((inputs["input_ids"] == image_token(model.config)).sum()), family.belief
    if belief.sizes is not None:
        if belief.sizes not in inputs:
            raise Unproven(f"its processor does not make {quoted(belief.sizes)}")
        lengths = [belief.layout(*size).length for size in belief.encoded_sizes(inputs)]
    else:
        lengths = [belief.layout(*belief.grid).length] * len(inputs["pixel_values"])
        if inputs["pixel_values"].shape[1:] != belief.shape:
            raise Unproven("large pictures are encoded at another size than small ones")
    if count != sum(lengths):
        raise Unproven(f"a large picture has {count} image tokens, where {sum(lengths)} were believed")
    if len(lengths) > 1:
        _test_crops(model, family, inputs, lengths)


def _test_crops(model: Model, family: Generic, inputs: dict[str, Any], lengths: list[int]) -> None:
    """Test that the tokens of all crops, so many of each, come in the order of their pixels.

    Crops are numbered from 1. One forward for each binary digit turns the colours of those whose number has it; the
    digits with which a crop's tokens change must then be its number. Tokens in the place of others would have those of
    several numbers, or of another one: since every crop fills its place, no exchange has the right digits everywhere.
    """
    whole = enter_decoder(model, inputs)
    plain, numbers = whole.embeds[whole.visual], range(1, len(lengths) + 1)
    moves = []
    for digit in range(len(lengths).bit_length()):
        changed = inputs | {"pixel_values": inputs["pixel_values"].clone()}
        for number, pixels in zip(numbers, family.pixels(model, Encoded("image", changed)), strict=True):
            if number >> digit & 1:
                pixels.neg_()
        other = enter_decoder(model, changed)
        moved = (other.embeds[other.visual] - plain).square().sum(1)
        moves.append(torch.stack([own.sum() for own in moved.split(lengths)]))
    most = torch.stack(moves).amax(0)
    turned = torch.stack(moves) > 1e-3 * most.clamp(min=1e-3 * float(most.max()))
    found = [sum(int(on) << digit for digit, on in enumerate(own)) for own in turned.T.tolist()]
    if found != list(numbers):
        raise Unproven("the tokens of a picture's crops do not come in the order of their pixels")
