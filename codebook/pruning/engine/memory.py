"""Asking again about an image without encoding it again."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from codebook import models
from codebook.errors import CodebookError
from codebook.models.base import Family, Model
from codebook.models.replacing import replaced
from codebook.pruning.engine.tap import replay, tap
from codebook.pruning.tokens import digest_rows

ADAPTER_SETTINGS = ("_active_adapter", "_disable_adapters", "scaling")
"""Attributes of peft's layers that say which adapters run, and how strongly."""

_lock = threading.Lock()
_memories: weakref.WeakKeyDictionary[Any, _Memory] = weakref.WeakKeyDictionary()
"""The memory of each tower that has one, for all contexts that are open on it."""


@contextlib.contextmanager
def remember(model: Model) -> Iterator[None]:
    """A context in which the vision tower runs once for each image, however many questions are asked about it.

    Images are known by their pixels. Each question may be under another schedule, inside this context: what is
    remembered is unpruned. Any thread may ask, and contexts of several threads share what they remember. Memory grows
    with the number of images, by the tower's outputs, and is freed when the last context is left, or when the tower's
    weights or adapters change. A call in which the tower learns runs it anew, for the gradients.

    Raises
    ------
    CodebookError
        If the model's tower does not take one row per image.
    """
    model = models.unwrap(model)
    family = models.family(model)
    if not family.tower_rows:
        raise CodebookError(
            f"the tower of {family.name} takes all images in one sequence and cannot remember single ones: encode them "
            "once with get_image_features and pass mm_encoder_outputs"
        )
    tower = family.tower(model)
    with _lock:
        memory = _memories.get(tower)
        if memory is None:
            memory = _memories[tower] = _Memory(family, model)
        memory.users += 1
    try:
        yield
    finally:
        with _lock:
            memory.users -= 1
            if not memory.users:
                del _memories[tower]
                memory.undo()


class _Memory:
    """What a tower put out for each image, and what its layer that feeds the projector attended with."""

    def __init__(self, family: Family, model: Model) -> None:
        self.users = 0
        self._tower = family.tower(model)
        self._known: dict[tuple[int, str], tuple[Any, tuple[Tensor, Tensor, float]]] = {}
        self._state: object = None  # of the tower that put it out
        self._latest = threading.local()
        self._attention = family.vision_attention(model)
        with contextlib.ExitStack() as undo:
            undo.callback(tap(self._attention, self._note))
            undo.enter_context(replaced(self._tower, "forward", lambda stock: partial(self._forward, stock)))
            self.undo = undo.pop_all().close

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise CodebookError("a model inside `remember` cannot be copied or saved: leave the context first")

    def _note(self, query: Tensor, key: Tensor, scaling: float) -> None:
        self._latest.heads = _kept(query), _kept(key), scaling

    def _forward(self, stock: Callable[..., Any], pixel_values: Tensor, **kwargs: Any) -> Any:
        # Where the context was left, something that others have put around this stays.
        if not self.users or self._learns(pixel_values):
            return stock(pixel_values, **kwargs)
        known = self._known if self._state == _tower_state(self._tower) else {}
        setting = f"{tuple(pixel_values.shape[1:])} {sorted(kwargs.items())}"
        keys = [(digest, setting) for digest in digest_rows(pixel_values).tolist()]
        new = [i for i, key in enumerate(keys) if key not in known]
        if new:
            output = stock(pixel_values[new], **kwargs)
            query, key, scaling = self._latest.heads
            for row, i in enumerate(new):
                known[keys[i]] = _row(output, row), (query[row : row + 1], key[row : row + 1], scaling)
            # Asked behind the forward: the first one may hook the tower, for what it puts out.
            self._known, self._state = known, _tower_state(self._tower)
        outputs, heads = zip(*(known[key] for key in keys), strict=True)
        queries, attended, scalings = zip(*heads, strict=True)
        # For a schedule that listens to the tower: it may have heard the new images only.
        replay(self._attention, torch.cat(queries), torch.cat(attended), scalings[0])
        self._latest.heads = None
        return _join(outputs)

    def _learns(self, pixel_values: Tensor) -> bool:
        """Whether a backward pass will ask what the tower did; remembered outputs have no gradient."""
        wanted = pixel_values.requires_grad or any(weight.requires_grad for weight in self._tower.parameters())
        return torch.is_grad_enabled() and wanted


def _tower_state(tower: nn.Module) -> object:
    """What changes when the tower comes to put out something else for the same pixels: weights, adapters, hooks."""
    modules = []
    for part in tower.modules():
        own = vars(part)
        # The tower's own hooks run in any case: it is called, and what is replaced is its `forward`.
        hooks = () if part is tower else (*own["_forward_pre_hooks"], *own["_forward_hooks"])
        modules.append((part.training, hooks, [str(own[name]) for name in ADAPTER_SETTINGS if name in own]))
    return models.weights_stamp(tower), modules


def _kept(value: Tensor) -> Tensor:
    """A copy that outlives the caller's mode: a tensor made in inference mode could not be in a later backward."""
    with torch.inference_mode(False):
        return value.detach().clone()


def _row(value: Any, row: int) -> Any:
    """One image's part of the tower's output."""
    if isinstance(value, Tensor):
        return _kept(value[row : row + 1])
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
