"""Methods of one object, replaced for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """A context in which `owner.name` is what `make` makes of it, for this object alone.

    What others put in its place meanwhile, as accelerate puts a `forward` around one, stays when the context is left.
    """
    # Some objects have one of their own already, as of a library that moves weights between devices.
    stock, own = getattr(owner, name), vars(owner).get(name)
    ours = make(stock)
    setattr(owner, name, ours)
    try:
        yield
    finally:
        if vars(owner).get(name) is ours:
            delattr(owner, name) if own is None else setattr(owner, name, own)
