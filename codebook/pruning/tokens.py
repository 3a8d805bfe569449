"""What a pruner is given: the visual tokens of one image, or of one crop or frame of it, at one stage."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from codebook.errors import CodebookError

if TYPE_CHECKING:
    from codebook.pruning.attention import Attention, TowerAttention

T = TypeVar("T")
DIGESTED = 2**25
"""Values digested at once: as int64, a quarter of a gigabyte."""


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image that are still there when a stage begins, in raster order.

    Crops of an image and frames of a video come one by one, unless they share one budget; each is an image here.

    Attributes
    ----------
    features : (n, d) float
        What entered the LLM for them: projector outputs, or what a stage before the LLM merged them into.
    hidden : (n, d) float
        Hidden states at the input of the stage's layer; before the LLM the same as `features`.
    sequence : (P, d) float
        Hidden states at that layer of all that the sample's row still holds, text and visual, without padding.
    span : slice or (n,) int64
        Where the image is in `sequence`.
    question : (T,) int64
        Where the text after the image is in `sequence`; in a model never empty.
    ordinal : (n,) int64
        Raster position of each token in its image, from 0 to `rows * cols - 1`.
    grid : (rows, cols)
        Rows and columns of the whole image.
    key : () int64
        Digest of the image's pixels and of its place among the prompt's images: the same alone or in any batch.
    attention : Attention or None
        Attention of the layer before the stage, or of the stage's own layer for pruners that say `own_layer`; only for
        those that say `uses_attention`.
    vision : TowerAttention or None
        Attention in the vision tower, over the whole image; only for pruners that say `uses_vision`.
    whole : (N, d) float or None
        What entered the LLM for all tokens of the image, before any stage.
    words : (T, d) float or None
        What entered the LLM for the text after the image: word embeddings.
    norm : callable or None
        The decoder's last normalisation, (k, d) -> (k, d), which stock models apply to what the last layer gives.
    pixels : (3, H, W) float or None
        The image as the vision tower takes it, where it is one such picture.
    encode : callable or None
        `encode(r, c)` gives the projector outputs (r * c, d) of the image resized to r x c patches; only before the
        LLM. Raises a CodebookError where the family cannot.
    known : dict
        What a pruner has worked out of these tokens, under keys of its own, for when it is asked what else there is to
        say of its choice. A generation without a KV cache, which repeats its choices, repeats it too.
    """

    features: Tensor
    hidden: Tensor
    sequence: Tensor
    span: slice | Tensor
    question: Tensor
    ordinal: Tensor
    grid: tuple[int, int]
    key: Tensor
    attention: Attention | None = None
    vision: TowerAttention | None = None
    whole: Tensor | None = None
    words: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    pixels: Tensor | None = None
    encode: Callable[[int, int], Tensor] | None = None
    known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ordinal)

    @property
    def last(self) -> Tensor:
        """(d,) hidden state of the prompt's last token."""
        return self.sequence[-1]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, kept in `known` under a key of the pruner's own."""
        if key not in self.known:
            self.known[key] = make()
        found: T = self.known[key]
        return found

    @classmethod
    def of(cls, features: Tensor) -> VisualTokens:
        """Tokens of which only `features`, the projector outputs (n, d), are known; the grid is taken to be one row.

        Raises
        ------
        CodebookError
            If they are no tensor (n, d) of floats.
        """
        if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point():
            what = f"{tuple(features.shape)} {features.dtype}" if isinstance(features, Tensor) else type(features)
            raise CodebookError(f"features are {what}: give the projector outputs of one image, (n, d) floats")
        ordinal = torch.arange(len(features), device=features.device)
        return cls(
            features, features, features, slice(0, len(features)), ordinal[:0], ordinal, (1, len(features)),
            ordinal.new_zeros(()),
        )  # fmt: skip


def needed(value: T | None, what: str) -> T:
    """The value, or a CodebookError when a pruner runs where it is not known."""
    if value is None:
        raise CodebookError(f"this method needs {what}: use it in a schedule, on a model's own forward")
    return value


def on_device(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Whole numbers (n,) int64 of the host on a device, sent without waiting until it has worked off its queue."""
    host = torch.as_tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors: a bijection that scatters nearby integers (Steele et al., 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def digest_rows(values: Tensor) -> Tensor:
    """One order-sensitive int64 digest for each row of a (rows, ...) tensor, from its exact bits, on its device."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    flat = values.detach().contiguous().flatten(1).view(bits).long()
    return mix((flat * places(flat.shape[1], flat.device)).sum(1))


def digests(values: Sequence[Tensor]) -> list[Tensor]:
    """For each tensor () int64, what `digest_rows` has for it: whole numbers add up to the same in any company.

    Those of one shape go through each step together, as many as `DIGESTED` values allow.
    """
    out: dict[int, Tensor] = {}
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for number, value in enumerate(values):
        alike.setdefault((value.shape, value.dtype), []).append(number)
    for (shape, _), numbers in alike.items():
        size = max(1, DIGESTED // max(1, shape.numel()))
        for part in (numbers[i : i + size] for i in range(0, len(numbers), size)):
            out |= zip(part, digest_rows(torch.stack([values[number] for number in part])).unbind(), strict=True)
    return [out[number] for number in range(len(values))]


@lru_cache(maxsize=8)  # the same for every image of one size, and slower than the rest of the digest
def places(count: int, device: torch.device) -> Tensor:
    """(count,) int64: the numbers from 1 on, each through `mix`."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        return mix(torch.arange(1, count + 1, device=device))
