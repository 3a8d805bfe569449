"""A KV cache layer that is physically shorter than the sequence it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from codebook.errors import CodebookError, quoted

PAD = torch.iinfo(torch.int64).max
"""The column of a padding entry: later than any query, so that no query sees it."""

CACHE_OPTION = "cache_implementation"
"""The argument of `generate` that names a kind of cache."""

PRUNABLE = (None, "dynamic", "hybrid")
"""Kinds that hold pruned layers; "hybrid", which older checkpoints ask for, is the default one since."""


@dataclass(frozen=True)
class KeptIndex:
    """Which logical columns a pruned layer stores; immutable, shared by the layers of one stage.

    Attributes
    ----------
    columns : (B, P) int64
        For each stored key its column in the unpruned sequence, `PAD` for padding.
    logical : int
        Length of the unpruned sequence so far.
    dropped : (B,) int64 or None
        How far positions of what comes next are behind its columns: `positions="compact"` closed the gaps of so many
        visual tokens of each row. None where positions are columns.
    padded : bool
        Whether any column is `PAD`.
    bias : (B, P) float32 or None
        What is added to every attention logit towards a stored key: the logarithm of how many tokens it stands for.
        None where each stands for itself.
    """

    columns: Tensor
    logical: int
    dropped: Tensor | None
    padded: bool
    bias: Tensor | None = None
    _latest: list[tuple[str, int | Tensor, KeptIndex]] = field(default_factory=list, init=False, repr=False)

    def shown(self, mask: Tensor) -> KeptIndex:
        """The index without what a mask (B, logical length or more) hides by now, such as what follows an answer."""
        on = mask.to(self.columns.device).bool().gather(1, self.columns.clamp(max=self.logical - 1))
        hidden = ~on & (self.columns != PAD)
        return replace(self, columns=self.columns.masked_fill(hidden, PAD), padded=True) if bool(hidden.any()) else self

    def rows(self, index: Tensor) -> KeptIndex:
        """The index of some of its rows, (B',) int64."""
        return self._once("rows", index, lambda: self._rows(index.to(self.columns.device)))

    def repeated(self, times: int) -> KeptIndex:
        """The index with each of its rows so many times."""
        places = torch.arange(len(self.columns), device=self.columns.device)
        return self._once("repeated", times, lambda: self._rows(places.repeat_interleave(times)))

    def cropped(self, count: int) -> KeptIndex:
        """The index without its last `count` columns.

        Raises
        ------
        CodebookError
            If these reach into what was pruned: a row may store less of them, or others, than another.
        """
        return self._once("cropped", count, lambda: self._cropped(count))

    def _cropped(self, count: int) -> KeptIndex:
        left, tail = self.columns[:, :-count], self.columns[:, -count:]
        whole = torch.arange(self.logical - count, self.logical, device=tail.device)
        if tail.shape[1] < count or not bool(((tail == whole) | (tail == PAD)).all()):
            raise CodebookError(
                f"the KV cache's last {count} tokens, to be cropped off, reach back into a pruned prompt: crop what "
                "came after it alone, or read the prompt anew"
            )
        bias = None if self.bias is None else self.bias[:, :-count]
        return replace(self, columns=left, logical=self.logical - count, bias=bias)

    def _rows(self, index: Tensor) -> KeptIndex:
        bias = None if self.bias is None else self.bias[index]
        dropped = None if self.dropped is None else self.dropped[index]
        return replace(self, columns=self.columns[index], dropped=dropped, bias=bias)

    def _once(self, how: str, by: int | Tensor, make: Callable[[], KeptIndex]) -> KeptIndex:
        """What the layers that share this index make of it one after the other: one object, so that they go on sharing.

        A cache tells its layers one by one to take other rows, or fewer columns. Were each to have an index of its own,
        every layer of every later forward would get a mask of its own.
        """
        for known, value, made in self._latest:
            if known == how and (value is by or (isinstance(by, int) and value == by)):
                return made
        self._latest[:] = [(how, by, make())]
        return self._latest[0][2]


def visible(
    query: Tensor, key: Tensor, since: Tensor | None, blocks: tuple[Tensor, Tensor] | None, window_last: bool
) -> Tensor:
    """Which keys each query sees.

    Parameters
    ----------
    query, key : (..., Q), (..., K) int64
        Their columns; `PAD` is seen by none.
    since : (..., Q) int64 or None
        The first column that each query sees, as of a sliding window; None for all.
    blocks : (..., Q), (..., K) int64
        Tokens of the same block, a number not negative, see each other in both directions.
    window_last
        Whether `since` also cuts through blocks.

    Returns
    -------
    (..., Q, K) bool
    """
    query, key = query[..., :, None], key[..., None, :]
    seen = key <= query
    near = None if since is None else key >= since[..., :, None]
    if near is not None and not window_last:
        seen = seen & near
    if blocks is not None:
        mine = blocks[0][..., :, None]
        seen = seen | (mine == blocks[1][..., None, :]) & (mine >= 0)
    if near is not None and window_last:
        seen = seen & near
    return seen & (key != PAD)


class PrunedLayer(DynamicLayer):
    """A `DynamicLayer` that reports its logical length, so positions and slicing in `generate` stay right.

    In place of a `DynamicSlidingWindowLayer` it keeps what has left the window too: masks hide it.
    """

    def __init__(self, source: DynamicLayer) -> None:
        super().__init__()
        self._unpruned = source.get_seq_length()
        if source.keys is not None and source.values is not None:
            self.lazy_initialization(source.keys, source.values)
            self.keys, self.values = source.keys, source.values
        self.index: KeptIndex | None = None
        self.coming: KeptIndex | None = None  # the index that the next update leads to

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        # Without the hooks the mask would be built for the logical length: wrong answers, silently.
        stored = self.physical + key_states.shape[-2]
        if self.coming is None or self.coming.columns.shape[1] != stored:
            raise CodebookError("this KV cache holds pruned layers: continue it inside `with schedule(model)`")
        self.index, self.coming = self.coming, None  # not before: attention may ask how much came before
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def physical(self) -> int:
        """Number of stored keys per row, padding counted."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        return self.index.logical if self.index is not None else self._unpruned

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.index is not None:
            self.index = self.index.rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.index is not None:
            self.index = self.index.repeated(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.index is not None:
            self.index = self.index.rows(indices)

    def crop(self, tokens_to_remove: int) -> None:
        index = self.index
        if tokens_to_remove and index is not None:
            index = index.cropped(abs(tokens_to_remove))  # before the keys: it may refuse
        super().crop(tokens_to_remove)
        self.index = index

    def reset(self) -> None:
        super().reset()
        self.index, self.coming, self._unpruned = None, None, 0


def check_cache(*said: Any) -> None:
    """Refuse a kind of cache that cannot hold pruned layers, before any work.

    Parameters
    ----------
    *said
        Where `generate` looks for `cache_implementation`, the first one first: its keyword arguments, the
        `generation_config` that it is given or None, the model's own.
    """
    found = (one.get(CACHE_OPTION) if isinstance(one, dict) else getattr(one, CACHE_OPTION, None) for one in said)
    kind = next((name for name in found if name is not None), None)
    if kind not in PRUNABLE:
        raise CodebookError(
            f"a {quoted(str(kind))} cache cannot hold pruned layers: use the default, without `{CACHE_OPTION}` in the "
            f"call and with `model.generation_config.{CACHE_OPTION} = None`"
        )


def check_given(cache: object, mask: Tensor | None, length: int, attending: Sequence[int], *, pruned: bool) -> None:
    """Refuse what a forward is given beside its tokens, if no right answer can come of it.

    Parameters
    ----------
    cache
        Its KV cache, or None.
    mask : (B, logical length) or None
    length
        Tokens of the forward.
    attending
        Layers of the decoder that have keys and values.
    pruned
        Whether this forward prunes; the cache may hold pruned layers in any case.

    Raises
    ------
    CodebookError
        For caches other than a plain `DynamicCache`, for those whose layers hold different tokens, and for masks of
        another length.
    """
    if cache is not None and (pruned or not hasattr(cache, "layers")):
        _dynamic(cache)
    layers = getattr(cache, "layers", ())
    held = [layers[i] for i in attending if i < len(layers)]
    if not pruned and not any(isinstance(layer, PrunedLayer) for layer in held):
        return  # stock models' own affair
    lengths = {layer.get_seq_length() for layer in held} or {0}
    if len(lengths) > 1:
        raise CodebookError(
            f"layers of this KV cache hold {' or '.join(map(str, sorted(lengths)))} tokens: a forward or a crop broke "
            "off half-way; read the prompt anew"
        )
    if mask is not None and mask.shape[1] != (whole := lengths.pop() + length):
        raise CodebookError(
            f"the attention mask is for {mask.shape[1]} tokens, and with those in the KV cache there are {whole}: give "
            "one for all of them, or none"
        )


def pruned_layer(cache: object, layer: int) -> PrunedLayer:
    """The cache's layer as a `PrunedLayer`, put in its place if it is not one yet.

    Raises
    ------
    CodebookError
        For caches other than a plain `DynamicCache`.
    """
    cache = _dynamic(cache)
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    entry = cache.layers[layer]
    if isinstance(entry, PrunedLayer):
        return entry
    if not isinstance(entry, DynamicLayer) or type(entry) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise CodebookError(f"a {type(entry).__name__} cannot be pruned: use the default DynamicCache")
    cache.layers[layer] = pruned = PrunedLayer(entry)
    return pruned


def _dynamic(cache: object) -> DynamicCache:
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        what = "cache that is offloaded" if isinstance(cache, DynamicCache) else type(cache).__name__
        raise CodebookError(
            f"a {what} cannot hold pruned layers: use the default DynamicCache (leave `{CACHE_OPTION}` unset, and call "
            "generate, not generate_batch)"
        )
    return cache
