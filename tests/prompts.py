"""Prompts with images for tiny LLaVAs, and what the reference needs to know of their pruning."""

import torch

from tests import reference

ONE = [[5, 6, "image", 7, 8, 9]]
RAGGED = [["image", 7, 8, 9, 10], [5, 6, 11, "image", 12, "image", 13], [3, "image", "image", 4]]


def size(model):
    """Visual tokens an image."""
    return (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2


def prompt(model, rows, pad_left=True):
    """Rows are lists of "image" and words (ids less 20: no special ones); returns model inputs, padded."""
    image, pad, side = model.config.image_token_id, model.generation_config.pad_token_id, model.config.vision_config
    ids = [[t for part in row for t in ([image] * size(model) if part == "image" else [part + 20])] for row in rows]
    longest = max(map(len, ids))
    pads = [[pad] * (longest - len(row)) for row in ids]
    padded = [p + row if pad_left else row + p for p, row in zip(pads, ids, strict=True)]
    mask = [[0] * len(p) + [1] * len(row) for p, row in zip(pads, ids, strict=True)]
    if not pad_left:
        mask = [m[::-1] for m in mask]
    images = sum(row.count("image") for row in rows)
    pixels = torch.rand(images, 3, side.image_size, side.image_size, generator=torch.Generator().manual_seed(images))
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask), "pixel_values": 2 * pixels - 1}


def assert_close(ours, theirs, tolerance=1e-5):
    """Equal up to float32 rounding of the largest logit."""
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def gone_from(inputs, pruning, schedule):
    """(B, L) first layer that no longer sees each column, from the kept sets that the pruning reports."""
    image_id, n = pruning.model.config.image_token_id, size(pruning.model)
    gone = torch.full(inputs["input_ids"].shape, 10**6)
    kept = iter(pruning.kept)
    for row, ids in enumerate(inputs["input_ids"]):
        columns = (ids == image_id).nonzero().flatten().view(-1, n)
        for image in columns:
            for stage, ordinals in reversed(list(zip(schedule.stages, next(kept), strict=True))):
                dropped = torch.ones(n, dtype=torch.bool)
                dropped[ordinals] = False
                gone[row, image[dropped]] = stage.layer
    return gone


def mass(inputs, pruning, schedule):
    """For the reference: what each column stands for, from the kept sets; None where no stage counts."""
    image_id, n = pruning.model.config.image_token_id, size(pruning.model)
    columns = [(row, part) for row, ids in enumerate(inputs["input_ids"])
               for part in (ids == image_id).nonzero().flatten().split(n)]  # fmt: skip
    units = [(*place, kept) for place, kept in zip(columns, pruning.kept, strict=True)]
    counts = [(stage.layer, stage.mass) for stage in schedule.stages]
    return reference.Mass(units, counts) if any(stage.mass for stage in schedule.stages) else None
