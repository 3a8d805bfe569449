"""Asking again about an image without encoding it again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from codebook import models
from codebook.errors import CodebookError
from codebook.pruning.engine.tap import replay, tap
from codebook.pruning.tokens import digest_rows


@contextlib.contextmanager
def remember(model: Any) -> Iterator[None]:
    """A context in which the vision tower runs once for each image, however many questions are asked about it.

    Images are known by their pixels. Each question may be under another schedule, inside this context: what is
    remembered is unpruned. Memory grows with the number of images, by the tower's outputs, and is freed on leaving.

    Raises
    ------
    CodebookError
        If the model's tower does not take one row an image.
    """
    family = models.family(model)
    if not family.tower_rows:
        raise CodebookError(
            f"the tower of {family.name} takes all images in one sequence and cannot remember single ones: encode them "
            "once with get_image_features and pass mm_encoder_outputs"
        )
    tower, attention = family.tower(model), family.vision_attention(model)
    known: dict[tuple[int, str], tuple[Any, tuple[Tensor, Tensor, float]]] = {}
    latest: list[tuple[Tensor, Tensor, float]] = []
    stock, own = tower.forward, tower.__dict__.get("forward")

    def forward(pixel_values: Tensor, **kwargs: Any) -> Any:
        setting = f"{tuple(pixel_values.shape[1:])} {sorted(kwargs.items())}"
        keys = [(digest, setting) for digest in digest_rows(pixel_values).tolist()]
        new = [i for i, key in enumerate(keys) if key not in known]
        if new:
            output = stock(pixel_values[new], **kwargs)
            query, key, scaling = latest.pop()
            for row, i in enumerate(new):
                known[keys[i]] = _row(output, row), (query[row : row + 1], key[row : row + 1], scaling)
        outputs, heads = zip(*(known[key] for key in keys), strict=True)
        queries, attended, scalings = zip(*heads, strict=True)
        # For a schedule that listens to the tower: it may have heard the new images only.
        replay(attention, torch.cat(queries), torch.cat(attended), scalings[0])
        latest.clear()
        return _join(outputs)

    undo = tap(attention, lambda query, key, scaling: latest.append((query.detach(), key.detach(), scaling)))
    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward
        if own is not None:  # another context's, or that of a library that moves weights between devices
            tower.forward = own
        undo()


def _row(value: Any, row: int) -> Any:
    """One image's part of the tower's output."""
    if isinstance(value, Tensor):
        return value[row : row + 1].detach()
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _row(part, row) for name, part in value.items()})
    return tuple(_row(part, row) for part in value) if isinstance(value, tuple) else value


def _join(parts: tuple[Any, ...]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, ModelOutput):
        return type(first)(**{name: _join(tuple(part[name] for part in parts)) for name in first})
    return tuple(_join(values) for values in zip(*parts, strict=True)) if isinstance(first, tuple) else first
