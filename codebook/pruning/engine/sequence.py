"""The sequence that a forward pass works on: what it was given, and what pruning has left of it.

Every place is named by its column in the forward's own input, (B, L), however short the sequence has become. So text,
images, masks, positions and the KV cache all speak of the same columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codebook.models.finite import damage


@dataclass(frozen=True)
class Given:
    """The input of a forward pass.

    Attributes
    ----------
    embeds : (B, L, d) float
        Embeddings, visual tokens merged in. Of a forward of text straight to the decoder only shape, device and dtype
        are known, and d is 0.
    mask : (B, logical length) or None
        The 2-D attention mask: 1 for a row's own tokens, 0 for padding. It also covers what is in the KV cache.
    extra : int
        How many of the L columns, the last ones, come after the prompt: tokens generated or guessed so far. They are
        no part of the question, and pruners do not see them.
    """

    embeds: Tensor
    mask: Tensor | None
    extra: int = 0

    @property
    def batch(self) -> int:
        """Number of rows, B."""
        return self.embeds.shape[0]

    @property
    def length(self) -> int:
        """Tokens of each row, L, padding counted."""
        return self.embeds.shape[1]

    @property
    def device(self) -> torch.device:
        return self.embeds.device

    def valid(self) -> Tensor:
        """(B, L): 1 for a row's own tokens, 0 for padding."""
        if self.mask is None:
            return torch.ones(self.batch, self.length, dtype=torch.long, device=self.device)
        return self.mask[:, -self.length :]


@dataclass(frozen=True)
class Shortened:
    """What is left of a forward's input, in order, rows padded on the left to the longest.

    Padding stands on the left because decoding reads the last position of every row.

    Attributes
    ----------
    source : (B, P) int64
        For each place its column in the input, -1 for padding.
    lengths : list[int]
        Tokens of each row, padding not counted; known on the host, so that no shape waits for the device.
    bias : (B, P) float32 or None
        What is added to every attention logit towards a token: the logarithm of how many tokens it stands for.
    first : (B, P) float32 or None
        The same in the decoder's first layer, if it is other there.
    distant : (B, P) bool or None
        Tokens towards which the prompt's logits also rise with distance; None if there are none.
    """

    source: Tensor
    lengths: list[int]
    bias: Tensor | None = None
    first: Tensor | None = None
    distant: Tensor | None = None

    @property
    def padded(self) -> bool:
        """Whether any row has padding."""
        return min(self.lengths) < self.source.shape[1]

    @property
    def own(self) -> Tensor | None:
        """(B, P) bool: False for padding, which recurrent layers must not take in; None where there is none."""
        return self.source >= 0 if self.padded else None

    def gather(self, x: Tensor) -> Tensor:
        """This sequence's entries of (B or 1, L, ...); those of the padding are arbitrary."""
        index = self.source.clamp(min=0).view(*self.source.shape, *[1] * (x.dim() - 2))
        return x.expand(len(self.source), *x.shape[1:]).gather(1, index.expand(*self.source.shape, *x.shape[2:]))

    def restore(self, hidden: Tensor, length: int) -> Tensor:
        """The decoder's output (B, P, d) at the input's `length`, for callers who index by the columns of their prompt.

        A dropped place has what the last token left before it has: what follows is predicted from there, as in the
        shorter prompt. So the loss of `labels` is that prompt's. Where none is left before it, a place is zero. Of a
        decoder that ends with fewer tokens, those are the last ones.
        """
        source = self.source[:, -hidden.shape[1] :].contiguous()
        columns = torch.arange(length, device=hidden.device).expand(len(source), -1).contiguous()
        last = torch.searchsorted(source, columns, right=True) - 1
        none = (last < 0) | (source.gather(1, last.clamp(min=0)) < 0)  # or padding
        full = hidden.gather(1, last.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
        return full.masked_fill_(none[..., None], 0)


def shorten(
    given: Given, now: Shortened | None, lengths: list[int], kept: Tensor, dropped: list[int], hidden: Tensor
) -> tuple[Shortened, Tensor]:
    """Leave out what a stage drops.

    A row with NaN or infinite values, dropped or not, becomes NaN, as the decoder would make it. Methods choose
    anything among such values, and an answer from what they chose would hide the damage.

    Parameters
    ----------
    now
        What earlier stages left; None for the whole input.
    lengths
        Tokens of each row before this stage.
    kept : (B, P) bool
        False for every place that is dropped.
    dropped
        How many these are in each row.
    hidden : (B, P, d) float

    Returns
    -------
    the shorter sequence, without bias
    hidden : (B, P', d)
    """
    left = [length - less for length, less in zip(lengths, dropped, strict=True)]
    places = torch.arange(hidden.shape[1], device=hidden.device)
    valid = given.valid().bool() if now is None else now.source >= 0
    # Sorting moves every kept place to the right in its order, and the -1 of all others to the left: padding.
    local = torch.where(kept & valid, places, -1).sort(dim=1).values[:, -max(left) :]
    shorter = Shortened(local, left)
    found = damage(hidden.detach()).masked_fill(~valid, 0).sum(1)
    hidden = shorter.gather(hidden).add_(found[:, None, None])
    if now is not None:  # `local` counts places of the sequence before: name columns of the input instead
        shorter = Shortened(torch.where(local < 0, -1, shorter.gather(now.source)), left)
    return shorter, hidden
