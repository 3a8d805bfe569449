"""Random's choice from its documented key, in Python's own integers: pixels, the image's place, seed, token's place."""

import numpy
import pytest
import torch

from codebook.pruning import Random, Schedule, Stage
from tests.models.cells import model as family_model
from tests.models.families import FAMILIES
from tests.prompts import prompt, size
from tests.tiny import llava

WORD = 2**64


def mixed(x):
    """SplitMix64's finaliser, from Steele et al. (2014), figure 16."""
    x %= WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def digest(pixels):
    """The bits of a picture's float32 values, each times a number of its position; of a film those of all frames."""
    bits = pixels.numpy().view(numpy.int32).ravel().tolist()
    return mixed(sum(b * mixed(i) for i, b in enumerate(bits, 1)))


def chosen(picture, place, n, keep, seed=0, grid=0):
    """The `keep` of n tokens with the highest signed scores, ascending."""
    key = mixed(picture + place) ^ mixed(grid)
    scores = [mixed(mixed(key + seed) ^ mixed(i + 1)) for i in range(n)]
    signed = [score - WORD if score >= WORD // 2 else score for score in scores]
    return sorted(sorted(range(n), key=signed.__getitem__)[n - keep :])


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 7])
def test_the_same_picture_twice_keeps_different_tokens(seed):
    """A chance of one in 10^8 of being equal by luck: 8 of 36 tokens."""
    model = llava()
    inputs = prompt(model, [[5, "image", 6, "image", 7], [8, "image", 9, 10, "image", 11]])
    first = inputs["pixel_values"][0]
    inputs["pixel_values"][:] = first
    with Schedule([Stage(0, 8, Random(seed))])(model) as pruning:
        model(**inputs)
    kept = [left.tolist() for (left,) in pruning.kept]
    assert kept[0] != kept[1]
    assert kept[:2] == kept[2:], "a place counts in its own row"
    assert kept[:2] == [chosen(digest(first), place, size(model), 8, seed) for place in (0, 1)]


@torch.no_grad()
def test_frames_alike_keep_different_tokens():
    """A still film: each frame has the same pixels, and a number of its own."""
    tiny, model = FAMILIES["llava_onevision"], family_model("llava_onevision", "sdpa")
    inputs = tiny.inputs([[5, "video", 6, 7]])
    [film] = inputs["pixel_values_videos"]
    film[:] = film[0]
    with Schedule([Stage(0, 0.5, Random())])(model) as pruning:
        model(**inputs)
    [video], [[kept]] = pruning.images, pruning.kept
    expected, start = [], 0
    for number, grid in enumerate(video.layout.grids):
        n = grid.rows * grid.cols
        expected.append([start + i for i in chosen(digest(film), 0, n, n // 2, grid=number)])
        start += n
    assert kept.tolist() == [i for frame in expected for i in frame]
    assert len({tuple(i % n for i in frame) for frame in expected}) > 1
