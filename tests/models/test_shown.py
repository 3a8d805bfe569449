"""Which part of a picture a view shows: seen in the pixels that the stock processors make of a gradient."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor, LlavaNextImageProcessor

from codebook.inference.overlay import shown_part
from codebook.models.llava import Llava
from codebook.models.llava_next import LlavaNext

PLAIN = {"do_normalize": False, "resample": 2}


def gradient(width, height):
    """Red says how far right a pixel is, green how far down."""
    right, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((255 * np.stack([right, down, 0 * right], -1)).round().astype("uint8"))


@pytest.mark.parametrize("size", [(300, 100), (100, 250), (120, 120)])
@pytest.mark.parametrize(
    ("family", "processor"),
    [
        (Llava(), CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64, **PLAIN)),
        (Llava(), CLIPImageProcessor(size={"shortest_edge": 80}, crop_size=64, **PLAIN)),
        (Llava(), CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False, **PLAIN)),
        (LlavaNext(), LlavaNextImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_grid_pinpoints=[[64, 128]], **PLAIN
        )),
    ],
    ids=["cut", "scaled and cut", "squeezed", "next"],
)  # fmt: skip
def test_the_corners_of_the_view(family, processor, size):
    picture = gradient(*size)
    pixels = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])
    view = pixels[0] if pixels.ndim == 4 else pixels
    first, last = view[:2, 0, 0], view[:2, -1, -1]
    box = family.shown_box(SimpleNamespace(image_processor=processor), size)
    cell = np.array([box[2] - box[0], box[3] - box[1]]) / 64  # a pixel of the view, of which the value is the middle
    assert first - cell / 2 == pytest.approx(box[:2], abs=0.02)
    assert last + cell / 2 == pytest.approx(box[2:], abs=0.02)
    part = np.asarray(shown_part(picture, box)) / 255
    assert part[0, 0, :2] == pytest.approx(box[:2], abs=0.02) and part[-1, -1, :2] == pytest.approx(box[2:], abs=0.02)
