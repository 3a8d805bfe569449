"""What pruning has done so far, added up over calls without ever making the host wait for the device."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from codebook.errors import counted


@dataclass(frozen=True)
class Statistics:
    """What a context has pruned since it was made, over all of its calls and threads.

    Attributes
    ----------
    forwards
        Forwards whose prompts showed images: one per `generate` with a KV cache.
    images
        Images that they showed, in every row: beams and repeated rows count each time.
    tokens
        Visual tokens of these images.
    kept
        How many of them the decoder's layers saw, averaged over the layers.
    selector_seconds
        Time in which the methods chose and merged: on the CPU the host's, on CUDA the device's between two events.
    """

    forwards: int = 0
    images: int = 0
    tokens: int = 0
    kept: float = 0.0
    selector_seconds: float = 0.0

    @property
    def keep(self) -> float:
        """`kept` as a fraction of `tokens`, the unit of every budget; 1 before the first image."""
        return self.kept / self.tokens if self.tokens else 1.0

    def __str__(self) -> str:
        return f"{counted(self.images, 'image')}, {self.kept:.0f} of {self.tokens} visual tokens kept ({self.keep:.1%})"


class Tally:
    """Statistics while they grow. Any thread may add to them; whoever reads them waits for the device, nobody else."""

    def __init__(self, layers: int) -> None:
        self._layers, self._lock = layers, threading.Lock()
        self._forwards = self._images = self._tokens = self._layer_tokens = 0
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def timing(self, device: torch.device) -> Iterator[None]:
        """A context whose time counts as the selector's."""
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(torch.cuda.current_stream(device))
            yield
            end.record(torch.cuda.current_stream(device))
            with self._lock:
                self._events.append((start, end))
                self._drain(wait=False)  # a server may never read them: keep few
            return
        began = time.perf_counter()
        yield
        with self._lock:
            self._seconds += time.perf_counter() - began

    def add(self, images: int, tokens: int, layer_tokens: int) -> None:
        """Count a forward: its images, their visual tokens, and how many of these each layer saw, summed."""
        with self._lock:
            self._forwards += 1
            self._images += images
            self._tokens += tokens
            self._layer_tokens += layer_tokens

    def read(self, wait: bool = True) -> Statistics:
        """The statistics so far; without `wait`, selector time on CUDA that the device has not finished is left out."""
        with self._lock:
            self._drain(wait)
            kept = self._layer_tokens / self._layers
            return Statistics(self._forwards, self._images, self._tokens, kept, self._seconds)

    def _drain(self, wait: bool) -> None:
        """Add up what the device has finished, or all of it; under the lock."""
        while self._events and (wait or self._events[0][1].query()):
            start, end = self._events.popleft()
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
