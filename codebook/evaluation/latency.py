"""Cost of an answer under a schedule: seconds by phase, peak memory, KV cache."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image as Picture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation.streamers import BaseStreamer

from codebook import models
from codebook.inference.prompts import prepare
from codebook.models.base import Model, Processor
from codebook.pruning import Schedule
from codebook.pruning.engine.context import Pruning
from codebook.pruning.engine.statistics import Tally

DECODED_TOKENS = 8
"""Tokens generated after the first one; their mean time is the time per decoded token."""


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds by phase. Only the innermost of nested phases runs; the device is synchronized at each border."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._phases: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._phases:
            self.seconds[self._phases[-1]] += now - self._since
        self._since = now

    def enter(self, phase: str, *_: Any) -> None:
        """Begin a phase; as a hook of a module, whose arguments do not matter."""
        self._turn()
        self._phases.append(phase)

    def leave(self, *_: Any) -> None:
        """End the innermost phase; as a hook, too."""
        self._turn()
        self._phases.pop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context that is timed as a phase."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def watching(self, model: Model) -> Iterator[None]:
        """A context that times the phases `vision` (tower and projector) and `prefill` (the decoder)."""
        family = models.family(model)
        parts = [("vision", family.tower(model)), ("vision", family.projector(model)), ("prefill", model.get_decoder())]
        with contextlib.ExitStack() as undo:
            for phase, module in parts:
                undo.callback(module.register_forward_pre_hook(partial(self.enter, phase)).remove)
                undo.callback(module.register_forward_hook(self.leave).remove)
            yield


class _SelectorTally(Tally):
    """A tally that has a clock time what the methods do, as the phase `selector`."""

    def __init__(self, layers: int, clock: Clock) -> None:
        super().__init__(layers)
        self._clock = clock

    @contextlib.contextmanager
    def timing(self, device: torch.device) -> Iterator[None]:
        with self._clock.phase("selector"):
            yield


@dataclass(frozen=True)
class TimedPrompt:
    """One prompt whose answers are timed, under any schedule.

    Attributes
    ----------
    prepare
        Makes the inputs of a batch of so many copies of the prompt.
    inputs
        Those of `size` copies, 1 at first.
    """

    model: Model
    prepare: Callable[[int], Any]
    inputs: Any
    size: int = 1

    @classmethod
    def of(cls, model: Model, processor: Processor, pictures: Sequence[Picture.Image], question: str) -> TimedPrompt:
        """The prompt of a question about pictures."""

        def make(size: int) -> Any:
            return prepare(model, processor, [list(pictures)] * size, [question] * size).inputs

        return cls(model, make, make(1))

    def generate(
        self, schedule: Schedule | None, tokens: int, clock: Clock | None = None, **options: Any
    ) -> tuple[Any, Pruning]:
        """Generate exactly `tokens` tokens, greedily; the output of `generate` and the pruning context.

        A clock times the phases: those of `Clock.watching`, and as `selector` what the methods do.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if clock is not None:
                stack.enter_context(clock.watching(self.model))
            pruning = stack.enter_context((schedule or Schedule([]))(self.model, "thread"))
            if clock is not None:
                pruning.tally = _SelectorTally(len(pruning.lm.layers), clock)
            length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            return self.model.generate(**self.inputs, **length, **options), pruning

    def seconds(self, schedule: Schedule | None) -> dict[str, float]:
        """Time to the first token, time per token after it, and, from a second run, the phases of the first token.

        Returns
        -------
        first_token, decode, vision, selector, prefill : seconds
        """
        device, stamps = self.model.device, _Stamps()
        synchronize(device)
        start = time.perf_counter()
        self.generate(schedule, 1 + DECODED_TOKENS, streamer=stamps)
        clock = Clock(device)
        self.generate(schedule, 1, clock=clock)
        return {
            "first_token": stamps.times[0] - start,
            "decode": (stamps.times[-1] - stamps.times[0]) / (len(stamps.times) - 1),
            **{phase: clock.seconds[phase] for phase in ("vision", "selector", "prefill")},
        }

    def repeated(self, size: int) -> TimedPrompt:
        """The same prompt, `size` times in one batch; its images are encoded as many times."""
        return replace(self, inputs=self.prepare(size), size=size)

    def rate(self, schedule: Schedule | None) -> float | None:
        """Answers per second, of 1 + DECODED_TOKENS tokens each; None if they do not fit into the device's memory."""
        device = self.model.device
        synchronize(device)
        start = time.perf_counter()
        try:
            self.generate(schedule, 1 + DECODED_TOKENS)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        synchronize(device)
        return self.size / (time.perf_counter() - start)

    def memory(self, schedule: Schedule | None) -> dict[str, int]:
        """Peak bytes beyond the weights up to the first token, and bytes of the KV cache after it."""
        kept: list[Any] = []
        peak = peak_bytes(self.model.device, lambda: kept.append(self._cache(schedule)))
        return {"peak_memory": peak, "kv_cache": kept[0]}

    def _cache(self, schedule: Schedule | None) -> int:
        out, _ = self.generate(schedule, 1, return_dict_in_generate=True)
        layers = [layer for layer in out.past_key_values.layers if layer.keys is not None]
        return sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))


class _Stamps(BaseStreamer):
    """Time at which each token was generated."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:  # on the CPU already, so its computation is done
        if not self._prompt:
            self.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None: ...


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """Most bytes held at once by tensors that `work` makes: by CUDA's allocator, else counted storage by storage."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _Storages() as counted:
        work()
    return counted.peak


class _Storages(TorchDispatchMode):
    """Counter of the bytes of storages that operators return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage not in self._seen:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, count: int) -> None:
        self.now -= count
