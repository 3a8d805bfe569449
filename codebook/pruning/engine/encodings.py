"""What a model has encoded, from the call that encodes images to the forward that shows them."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor

from codebook.models import Encoded


class Noted(NamedTuple):
    """What a model encoded, the call that encoded it, and where it was noted."""

    by: Encodings
    output: Any
    call: Encoded


ENCODING: ContextVar[Encoded | None] = ContextVar("codebook_encoding", default=None)
"""The encoding of images that is running, which may call itself in parts."""
ENCODED: ContextVar[tuple[Noted, ...]] = ContextVar("codebook_encoded", default=())
"""What was encoded and not shown to a forward yet, or only to the one that runs, by all models."""


class Encodings:
    """The calls that encoded images with one model.

    Parameters
    ----------
    whole
        Whether its vision tower sees all images of a call at once.
    """

    def __init__(self, whole: bool) -> None:
        self._whole = whole
        self._outputs: dict[int, tuple[weakref.ref[Any], Encoded]] = {}

    def note(self, kind: str, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The output of a call of `get_image_features` or `get_video_features`, which is noted."""
        if ENCODING.get() is not None:
            return stock(*args, **kwargs)  # a part of the one that is being noted
        call = Encoded(kind, dict(inspect.signature(stock).bind_partial(*args, **kwargs).arguments))
        token = ENCODING.set(call)
        try:
            output = stock(*args, **kwargs)
        finally:
            ENCODING.reset(token)
        others = (noted for noted in ENCODED.get() if noted.by is not self or noted.call.kind != kind)
        ENCODED.set((*others, Noted(self, output, call)))
        with contextlib.suppress(TypeError):  # a plain tuple or tensor is known in this thread alone
            key = id(output)
            self._outputs[key] = weakref.ref(output, lambda _: self._outputs.pop(key, None)), call
        return output

    def hear(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Keep what the tower's attention was asked in the call that is running."""
        if (encoding := ENCODING.get()) is not None:
            if self._whole:  # `remember` may have let the new images through before
                encoding.attention.clear()
            encoding.attention.append((query, key, scaling))

    def show(self, kind: str, given: dict[str, Any]) -> Encoded | None:
        """The call that encoded the images that a forward shows, if it was noted."""
        output = (given.get("mm_encoder_outputs") or {}).get(kind)
        found = [
            noted.call
            for noted in self._noted()
            if noted.call.kind == kind and (output is None or _one_output(noted.output, output))
        ]
        if not found and output is not None and id(output) in self._outputs:
            reference, call = self._outputs[id(output)]
            found = [call] if reference() is output and call.kind == kind else []
        if not found:
            return None
        found[-1].shown = True
        return found[-1]

    def waiting(self) -> Iterator[Encoded]:
        """The calls of this thread whose images no forward has shown yet."""
        return (noted.call for noted in self._noted() if not noted.call.shown)

    def forget(self, *, shown: bool) -> None:
        """Forget what this thread has encoded: all of it, or what a forward has shown."""
        ENCODED.set(tuple(noted for noted in ENCODED.get() if noted.by is not self or (shown and not noted.call.shown)))

    def _noted(self) -> Iterator[Noted]:
        return (noted for noted in ENCODED.get() if noted.by is self)


def _one_output(one: Any, other: Any) -> bool:
    """Whether two outputs are one, or other objects around the same features, as accelerate makes where it offloads."""
    return one is other or ((features := _last_features(one)) is not None and features is _last_features(other))


def _last_features(output: Any) -> Any:
    """The features of the last image in an output."""
    found = getattr(output, "pooler_output", None)
    if found is None:  # all features are for layers of the decoder, each behind its layer's number
        found = getattr(output, "deepstack_features", None)
    while isinstance(found, list | tuple) and found:
        found = found[-1]
    return found
