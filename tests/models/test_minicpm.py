"""What only MiniCPM-V has: crops with places, frames and crops of one video, and another mode for a call."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from PIL import Image

from codebook import models
from codebook.errors import CodebookError
from codebook.models import any_size
from codebook.pruning import Random, Schedule, Stage
from tests import reference
from tests.models.cells import gone_from, model
from tests.models.families import FAMILIES
from tests.models.prompts import NEWLINE
from tests.tiny import IMAGE, PAD

NAMES = [name for name in ("minicpmv4_6", "minicpmv4_7") if name in FAMILIES]
SCHEDULE = Schedule([Stage(0, 0.5, Random()), Stage(2, 0.25, Random())])


@pytest.fixture(params=NAMES)
def tiny(request):
    return FAMILIES[request.param]


def images(tiny, inputs):
    with SCHEDULE(model(tiny.name, "sdpa")) as pruning, torch.no_grad():
        model(tiny.name, "sdpa")(**inputs)
    return pruning.images


def test_crops_are_where_the_text_between_them_says(tiny):
    [image] = images(tiny, tiny.inputs([[3, "large", 5]]))
    assert [(grid.kind, grid.box) for grid in image.layout.grids] == [
        ("view", (0, 0, 1, 1)),
        ("crop", (0, 0, 0.5, 0.5)),
        ("crop", (0.5, 0, 1, 0.5)),
        ("crop", (0, 0.5, 0.5, 1)),
        ("crop", (0.5, 0.5, 1, 1)),
    ]


def test_text_between_frames_begins_another_video(tiny):
    assert [image.layout.pieces for image in images(tiny, tiny.inputs([["video", 5, "video", 6]]))] == [2, 2]
    assert [image.layout.pieces for image in images(tiny, tiny.inputs([["image", "large", 6]]))] == [1, 5]


@torch.no_grad()
def test_a_call_in_the_other_mode_has_four_times_the_tokens(tiny):
    target = model(tiny.name, "sdpa")
    inputs = tiny.inputs([["image", 5, 6]])
    ids = inputs["input_ids"][0].tolist()
    at = ids.index(IMAGE)
    ids = torch.tensor([ids[:at] + [IMAGE] * 64 + ids[at + 16 :]])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tiny.types(ids), "downsample_mode": "4x"}
    with SCHEDULE(target) as pruning:
        out = target.generate(
            **inputs, max_new_tokens=2, do_sample=False, suppress_tokens=list(tiny.never), output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    [image] = pruning.images
    assert [(grid.rows, grid.cols) for grid in image.layout.grids] == [(8, 8)]
    gone = gone_from(inputs, [(0, None, torch.arange(at, at + 64))], pruning.kept, SCHEDULE.stages)
    said = out.sequences[:, ids.shape[1] :]
    tokens, logits = reference.masked(target, inputs, gone, said, suppress=tiny.never)
    assert torch.equal(said, tokens)
    assert (torch.stack(out.logits, 1) - logits).abs().max() <= 1e-5 * logits.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("after", [[5], [NEWLINE, 5], [NEWLINE, NEWLINE, 5]])
def test_a_probe_has_the_positions_of_the_tokens_around_its_image(tiny, after, monkeypatch):
    """In 4.7, newlines behind an image belong to it."""
    monkeypatch.setattr(any_size, "VIEW_SIDE", 4)
    target, family = model(tiny.name, "sdpa"), models.family(model(tiny.name, "sdpa"))
    inputs = tiny.inputs([[3, "image"]])
    ids = torch.cat([inputs["input_ids"], torch.tensor([after])], 1)
    inputs |= {"input_ids": ids, "attention_mask": (ids != PAD).long(), **tiny.types(ids)}
    expected = target(**inputs).logits[:, -1]
    embeds = family.words(target, ids)
    at = ids[0].tolist().index(IMAGE)
    embeds[:, at : at + 16] = family.image_features(target, inputs["pixel_values"])[0]
    answer = family.answer(target, embeds, at, (4, 4))
    assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()


class Larger(hf.MiniCPMV4_6ImageProcessor if NAMES else object):
    """As MiniCPM-OCR's where it enlarges small letters."""

    def __call__(self, images, scale_resolution, **options):
        return super().__call__(images, scale_resolution=2 * scale_resolution, **options)


def test_a_processor_that_enlarges_the_view_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(any_size, "VIEW_SIDE", 4)
    processor = SimpleNamespace(image_processor=Larger(patch_size=4))
    with pytest.raises(
        CodebookError, match=r"other sizes of a picture of 64 x 64 pixels: .*small_image_upsize='always'"
    ):
        models.family(model(tiny.name, "sdpa")).view(processor, Image.new("RGB", (50, 30)))
