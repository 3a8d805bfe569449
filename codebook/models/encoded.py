"""The record of a call that encoded images or videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class Encoded:
    """One call of a model's `get_image_features` or `get_video_features`.

    Attributes
    ----------
    kind
        `image` or `video`.
    given
        The call's arguments, by name.
    attention
        Queries and keys (B, heads, N, d) and their scaling in the tower's layer that feeds the projector, one entry per
        call of its attention function; empty unless a pruner needs them.
    shown
        Whether a forward has used the result.
    """

    kind: str
    given: dict[str, Any]
    attention: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    shown: bool = False
