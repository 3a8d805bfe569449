"""Positions of pruned prompts, against transformers' positions of the unpruned ones."""

import pytest
import torch

from codebook.integrations.vllm.positions import (
    CHANNELS,
    Placed,
    place,
    prompt_positions,
    with_places,
    without_places,
)
from tests.models.families import FAMILIES
from tests.tiny import IMAGE

TALL, WIDE, SQUARE = (9, 2), (3, 7), (4, 4)
LAYOUTS = [[2, TALL, 3], [WIDE, 1], [1, TALL, 1, WIDE, 2, SQUARE, 4], [5]]


@pytest.fixture(scope="module")
def stock():
    return FAMILIES["qwen2_vl"].make().base_model


def unpruned(stock, parts):
    """Ids of a prompt of words and of images (rows, cols), and transformers' positions of it."""
    ids = [[20] * part if isinstance(part, int) else [IMAGE] * (part[0] * part[1]) for part in parts]
    ids = torch.tensor([[one for own in ids for one in own]])
    sizes = torch.tensor([[1, 2 * part[0], 2 * part[1]] for part in parts if not isinstance(part, int)])
    positions, delta = stock.get_rope_index(
        ids, mm_token_type_ids=(ids == IMAGE).long(), image_grid_thw=sizes if len(sizes) else None
    )
    return ids[0], positions[:, 0], int(delta) + ids.shape[1]


def pruned(parts, keep, generator):
    """Images of the pruned prompt, tokens of the unpruned one that stay, and of each image those that stay in it."""
    images, kept, own, offset, place = [], [], [], 0, 0
    for part in parts:
        if isinstance(part, int):
            kept.append(place + torch.arange(part))
            place, offset = place + part, offset + part
            continue
        rows, cols = part
        index = torch.randperm(rows * cols, generator=generator)[:keep].sort().values
        images.append(Placed(offset, keep, rows, cols))
        kept.append(place + index)
        own.append(index)
        place, offset = place + rows * cols, offset + keep
    return images, torch.cat(kept), own


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("parts", LAYOUTS)
def test_positions_are_those_of_the_unpruned_prompt(stock, parts, chunk):
    ids, positions, after = unpruned(stock, parts)
    images, kept, own = pruned(parts, 5, torch.Generator().manual_seed(0))
    found, ahead = prompt_positions(len(kept), images)
    assert len(kept) + ahead == after
    text = ids[kept] != IMAGE
    assert torch.equal(found[:, text], positions[:, kept][:, text])  # right before anything is encoded
    encoded = [with_places(torch.ones(5, 8), index, image.cols) for index, image in zip(own, images, strict=True)]
    for start in range(0, len(kept), chunk):
        parts_of_it = []
        for image, whole in zip(images, encoded, strict=True):
            part = whole[max(0, start - image.offset) : max(0, start + chunk - image.offset)]
            parts_of_it += [part] if len(part) else []
        if parts_of_it:
            features, places = zip(*map(without_places, parts_of_it), strict=True)
            assert all(torch.equal(one, torch.ones(len(one), 8)) for one in features)
            found = place(found, ids[kept].tolist(), IMAGE, start, torch.cat(places, 1))
    assert torch.equal(found, positions[:, kept])


def test_a_prompt_of_which_the_beginning_is_cached(stock):
    parts = [2, TALL, 3, WIDE, 2]
    ids, positions, _ = unpruned(stock, parts)
    images, kept, own = pruned(parts, 5, torch.Generator().manual_seed(0))
    start = images[0].offset + 3  # two tokens of the first image are left
    given = [with_places(torch.ones(5, 8), index, image.cols) for index, image in zip(own, images, strict=True)]
    places = torch.cat([without_places(given[0][3:])[1], without_places(given[1])[1]], 1)
    found = place(prompt_positions(len(kept), images)[0], ids[kept], IMAGE, start, places)
    assert torch.equal(found[:, start:], positions[:, kept][:, start:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_places_survive_every_precision(dtype):
    cols = 65535
    ordinal = torch.tensor([0, 255, 256, 257, 1000 * cols + 65534, 65535 * cols + 511])
    embeddings = torch.randn(6, 3).to(dtype)
    wide = with_places(embeddings, ordinal, cols)
    assert wide.dtype == dtype and wide.shape == (6, 3 + CHANNELS)
    found, (rows, columns) = without_places(wide)
    assert torch.equal(found, embeddings)
    assert rows.tolist() == [0, 0, 0, 0, 1000, 65535] and columns.tolist() == [0, 255, 256, 257, 65534, 511]
