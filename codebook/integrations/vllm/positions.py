"""Positions of pruned images with three axes (M-RoPE), as vLLM asks for them: whole numbers alone, nothing of vLLM.

They are those of the unpruned prompt. A token that stays keeps its row and column in the whole image, and the text
after an image goes on behind its longer side, however few of its tokens are left (Qwen2-VL, arXiv 2409.12191).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BASE = 256
"""bfloat16 has all whole numbers up to this one."""
CHANNELS = 4
"""Columns that travel with an image's embeddings: its tokens' rows and columns, two digits each."""


class Placed(NamedTuple):
    """Where a pruned image is in its prompt, and how large the whole image is, in tokens."""

    offset: int
    kept: int
    rows: int
    cols: int


def prompt_positions(length: int, images: Sequence[Placed]) -> tuple[Tensor, int]:
    """Positions of a prompt's tokens, for visual tokens those of their image's first one.

    Returns
    -------
    (3, length) int64, and by how much the positions are ahead of a prompt without images at its end
    """
    advance = torch.ones(length, dtype=torch.int64)
    for image in images:
        advance[image.offset : image.offset + image.kept] = 0
        advance[image.offset + image.kept - 1] = max(image.rows, image.cols)
    return (advance.cumsum(0) - advance).repeat(3, 1), int(advance.sum()) - length


def with_places(embeddings: Tensor, ordinal: Tensor, cols: int) -> Tensor:
    """The embeddings of an image's kept tokens, and behind them the tokens' places in it.

    Parameters
    ----------
    embeddings : (keep, d) float
        In 16 bits or more.
    ordinal : (keep,) int64
        Raster positions in the whole image, of fewer than 65,536 rows and columns.
    cols
        Its columns.

    Returns
    -------
    (keep, d + CHANNELS) of the same dtype
    """
    row, col = ordinal // cols, ordinal % cols
    digits = torch.stack([row // BASE, row % BASE, col // BASE, col % BASE], dim=1)
    return torch.cat([embeddings, digits.to(embeddings.dtype)], dim=1)


def without_places(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """What went into `with_places`: the embeddings (keep, d), and rows and columns (2, keep) int64."""
    digits = embeddings[:, -CHANNELS:].long().unflatten(1, (2, 2))
    return embeddings[:, :-CHANNELS], (digits[..., 0] * BASE + digits[..., 1]).T


def place(positions: Tensor, ids: Sequence[int] | Tensor, image_token: int, start: int, places: Tensor) -> Tensor:
    """Positions of a prompt in which the visual tokens that come next have their rows and columns.

    Parameters
    ----------
    positions : (3, n) int64
        What `prompt_positions` gave, with or without the places of other tokens.
    ids : (n,)
        The prompt's tokens.
    start
        The visual tokens from this one on are meant, as many as there are places.
    places : (2, keep) int64
        As `without_places` gives them.
    """
    visual = torch.as_tensor(ids, device=positions.device) == image_token
    visual[:start] = False
    number = visual.cumsum(0)
    count = places.shape[1]
    own = positions[0] + places[:, (number - 1).clamp(0, count - 1)]
    return torch.cat([positions[:1], torch.where(visual & (number <= count), own, positions[1:])])
