"""A pruner only chooses: slicing, masks, positions, caches and quotas are the library's (`codebook/pruning/engine`)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields, is_dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from codebook.errors import CodebookError, quoted
from codebook.pruning.tokens import VisualTokens, needed

LEAST_LENGTH = 1e-12
"""Length that a vector is taken to have at least where it is divided by: one of zeros is like nothing."""

GRAM_ROWS = 288
"""Rows of a block of `gram`: measured on one core with AVX-512, n = 576 and 2880, d = 1024 and 4096."""

AT_ONCE = 2**26
"""Numbers that methods hold at once for several images: in float32 a quarter of a gigabyte."""


class Pruner(ABC):
    """A method of pruning: it chooses which of one image's visual tokens stay."""

    uses_attention: ClassVar[bool] = False
    """Whether it needs `tokens.attention`; such a pruner works at layer 1 or later."""

    default_layer: ClassVar[int] = 2
    """Where it stands alone and cannot stand before the LLM, its layer in a decoder of 32: K of FastV and DART."""

    @property
    def own_layer(self) -> bool:
        """Whether that attention is the stage's own layer's, as it would be if the stage dropped nothing."""
        return False

    uses_vision: ClassVar[bool] = False
    """Whether it needs `tokens.vision`."""

    uses_text: ClassVar[bool] = False
    """Whether it needs what else is in the prompt: `tokens.question`, `tokens.sequence` or `tokens.last`."""

    uses_change: ClassVar[bool] = False
    """Whether it compares `tokens.hidden` with `tokens.features`; such a pruner works at layer 1 or later."""

    before_llm: ClassVar[bool] = False
    """Whether it works before the LLM only, at layer 0."""

    joint: ClassVar[bool] = False
    """Whether it chooses among all frames of a film at once (`FramePruner`)."""

    adaptive: ClassVar[bool] = False
    """Whether the pruner itself decides how many tokens stay; its stage's `keep` is then None."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # no text says numpy's numbers
                object.__setattr__(self, name, value.item())
        check_options(type(self), vars(self))

    @abstractmethod
    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        """Indices of the tokens that stay.

        Parameters
        ----------
        tokens
            The `n` tokens of one image.
        keep
            How many stay, 1 <= keep <= n.

        Returns
        -------
        (keep,) int64, ascending, without repeats, on the tokens' device
        """

    def choose(self, tokens: VisualTokens) -> Tensor:
        """The same for adaptive pruners, which decide themselves how many stay.

        Parameters
        ----------
        tokens
            The `n` tokens of one image.

        Returns
        -------
        (k,) int64, at least one, ascending, without repeats, on the tokens' device

        Raises
        ------
        CodebookError
            If the pruner is not adaptive.
        """
        raise CodebookError(f"{type(self).__name__} cannot choose how many tokens stay: give its stage a keep")

    def merge(self, tokens: VisualTokens, index: Tensor) -> Tensor | None:
        """New hidden states for the tokens that stay.

        Parameters
        ----------
        tokens
            The `n` tokens of one image.
        index : (keep,) int64
            What `select` or `choose` returned for them.

        Returns
        -------
        (keep, d) of the dtype of `tokens.hidden`; None leaves the hidden states as they are
        """
        return None

    def groups(self, tokens: VisualTokens, index: Tensor) -> Tensor | None:
        """Which of the tokens that stay each token belongs to, for stages with `mass`.

        Parameters
        ----------
        tokens
            The `n` tokens of one image.
        index : (keep,) int64
            What `select` or `choose` returned for them.

        Returns
        -------
        (n,) int64, places in `index`; None: each belongs to the one most like it, by hidden states (`nearest_kept`)
        """
        return None


def beyond_features(pruner: Pruner) -> str:
    """What a pruner needs beside projector outputs, a grid and a number of tokens to choose by, in words.

    Empty if it needs no more: such a choice can be made where an image is encoded, before there is a prompt.
    """
    needs = {
        "attention": pruner.uses_attention,
        "the vision tower's attention": pruner.uses_vision,
        "the text": pruner.uses_text,
        "a layer's hidden states": pruner.uses_change,
        "to say how many tokens stay": pruner.adaptive,
        "all frames of a video": pruner.joint,
        "to merge tokens": type(pruner).merge is not Pruner.merge,
    }
    return next((what for what, needed in needs.items() if needed), "")


class ScoringPruner(Pruner):
    """A pruner that keeps the tokens with the highest scores."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """(n,) scores; the tokens with the highest are kept."""

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        scores = self.score(tokens)
        if scores.shape != (len(tokens),):
            raise CodebookError(
                f"{type(self).__name__} gives scores of shape {tuple(scores.shape)} for {len(tokens)} tokens: give one "
                "for each"
            )
        return scores.topk(keep).indices.sort().values


class FeaturePruner(Pruner):
    """A pruner that chooses by projector outputs alone, for several images at once, and merges nothing."""

    @abstractmethod
    def select_each(self, features: Tensor, keep: int) -> Tensor:
        """Indices of the tokens that stay of each image: the same as of that image alone.

        Parameters
        ----------
        features : (B, n, d) float
            What entered the LLM for the tokens of B images, or crops or frames.
        keep
            How many stay of each, 1 <= keep <= n.

        Returns
        -------
        (B, keep) int64, each row ascending, without repeats, on the features' device
        """

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        return self.select_each(tokens.features[None], keep)[0]


class FramePruner(Pruner):
    """A pruner that chooses among all frames of a film at once: one may keep more of its tokens than another.

    A film is a video, or all images of one prompt, since many models are shown a video as several images. How many
    tokens each frame keeps depends on what it shows, so the host waits for the device once per film.
    """

    joint: ClassVar[bool] = True

    @abstractmethod
    def select_frames(self, frames: Sequence[VisualTokens], keep: int) -> list[Tensor]:
        """Indices of the tokens that stay of each frame.

        Parameters
        ----------
        frames
            In their order, all of one grid; what earlier stages left of each.
        keep
            How many stay of all frames together, from 1 to as many as they have.

        Returns
        -------
        For each frame (k,) int64, ascending, without repeats, on the tokens' device; `keep` in all
        """

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        return self.select_frames([tokens], keep)[0]


def whole_frames(frames: Sequence[VisualTokens]) -> Tensor:
    """(F, N, d) float32: what entered the LLM for all N tokens of each frame, before any stage."""
    return torch.stack([needed(frame.whole, "the frames' tokens") for frame in frames]).float()


def option(default: Any, least: float = -math.inf, most: float = math.inf, choices: Sequence[str] = ()) -> Any:
    """A field of a pruner's dataclass, with the values that it may have: a choice, or those of the default's type.

    Numbers are from least to most; the bounds of a field that holds several are each number's.
    """
    return field(default=default, metadata={"least": least, "most": most, "choices": choices})


def check_options(kind: type[Pruner], values: Mapping[str, Any]) -> None:
    """Raise a CodebookError unless these values of a pruner's fields are such as their `option` allows."""
    own: tuple[Field[Any], ...] = fields(kind) if is_dataclass(kind) else ()
    for known in own:
        if known.name not in values or not known.metadata.keys() >= {"least", "most", "choices"}:
            continue
        name, value = known.name, values[known.name]
        least, most, choices = (known.metadata[key] for key in ("least", "most", "choices"))
        if not is_like(value, known.default):
            raise CodebookError(f"{name} of {kind.__name__} must be like {known.default!r}, not {quoted(value)}")
        if choices:
            if value not in choices:
                raise CodebookError(f"{name} is {quoted(value)}: give {' or '.join(map(repr, choices))}")
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if not least <= number <= most:
                bounds = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
                raise CodebookError(f"{name} is {quoted(value)}: give {bounds}")


def is_like(value: Any, example: Any) -> bool:
    """Whether a value has the type of an option's default: tuples of the same length, whole numbers for any number."""
    if isinstance(example, tuple):
        return isinstance(value, tuple) and len(value) == len(example) and all(map(is_like, value, example))
    if isinstance(example, float):
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) is type(example)


def unit_range(x: Tensor) -> Tensor:
    """Scale to [0, 1]; equal values become 0."""
    low, high = x.aminmax()
    return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)


def group_means(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Mean of the members of each of `count` groups.

    Parameters
    ----------
    values : (n, d) float
    group : (n,) int64
        From 0 to count - 1; every group has a member. A value of `count` is in none.

    Returns
    -------
    (count, d) in the dtype of `values`, summed in float32 and in the order of the rows, on every device
    """
    order, begins = _in_order(group, count)
    # The bag after the last group has those that are in none.
    return embedding_bag(order, values.float(), begins, mode="mean")[:count].to(values.dtype)


def gram(x: Tensor) -> Tensor:
    """The products of each row with each: x @ x.T of (n, d), (n, n).

    On a CPU only one half is computed where n is large, block by block, and mirrored: up to twice as fast, and exactly
    symmetric. Up to `GRAM_ROWS` rows, and on other devices, where the host would have to say each block, it is the
    plain product.
    """
    n = len(x)
    if n <= GRAM_ROWS or x.device.type != "cpu":
        return x @ x.T
    out = x.new_empty(n, n)
    for start in range(0, n, GRAM_ROWS):
        end = start + GRAM_ROWS
        out[start:end, start:] = x[start:end] @ x[start:].T
        out[end:, start:end] = out[start:end, end:].T
    return out


def nearest_kept(values: Tensor, index: Tensor) -> Tensor:
    """For each token the kept one most like it, by cosine similarity; a kept token has itself.

    Parameters
    ----------
    values : (n, d) float
        What is compared, in float32.
    index : (keep,) int64
        The tokens that are kept, at least one.

    Returns
    -------
    (n,) int64, places in `index`
    """
    return nearest_kept_each(values, torch.arange(len(values), device=values.device)[None], index[None])[0]


def nearest_kept_each(rows: Tensor, places: Tensor, index: Tensor) -> Tensor:
    """The same for several images at once: of each what it is for that image alone.

    Parameters
    ----------
    rows : (N, d) float
        What is compared, of all images.
    places : (B, n) int64
        Where among them each image's tokens are.
    index : (B, keep) int64
        Which of its n tokens each image keeps.

    Returns
    -------
    (B, n) int64, places in each row of `index`
    """
    n, keep = places.shape[1], index.shape[1]
    nearest = torch.zeros_like(places)
    # Those that are not kept, in their order: sorted, since to ask which they are would make the host wait.
    others = torch.ones_like(nearest).scatter_(1, index, 0).argsort(dim=1, descending=True, stable=True)[:, : n - keep]
    parts = max(1, AT_ONCE // (n * max(rows.shape[1], keep)))
    found = []
    for part, own, rest in zip(places.split(parts), index.split(parts), others.split(parts), strict=True):
        both = part.gather(1, torch.cat([own, rest], 1))
        kept, left = rows.index_select(0, both.flatten()).float().view(*both.shape, -1).split([keep, n - keep], 1)
        # A token's own length does not change which kept one is nearest.
        pairs = zip(left, normalize(kept, dim=-1), strict=True)
        # Image by image: products of several matrices at once may be rounded in another way, and what an image's
        # tokens stand for would depend on its neighbours.
        found.append(torch.stack([tokens @ chosen.T for tokens, chosen in pairs]).argmax(2))
    nearest.scatter_(1, others, torch.cat(found))
    return nearest.scatter_(1, index, torch.arange(keep, device=index.device).expand_as(index))


def middles(groups: Tensor, count: int) -> Tensor:
    """The middle member of each group of tokens in raster order; of an even number, the former of two.

    Parameters
    ----------
    groups : (..., n) int64
        Which of the groups each token is of, as `nearest_kept` gives it. None is empty but where values are NaN.
    count
        How many groups there are.

    Returns
    -------
    (..., count) int64; some token of the image for an empty group
    """
    order, begins = _in_order(groups, count)
    return order.gather(-1, ((begins[..., :-1] + begins[..., 1:] - 1) // 2).clamp(min=0))


def _in_order(groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The members of all groups, group by group, and where each of the `count` groups begins there, then their end."""
    order = groups.argsort(stable=True)
    bounds = torch.arange(count + 1, device=groups.device).expand(*groups.shape[:-1], count + 1)
    return order, torch.searchsorted(groups.gather(-1, order), bounds.contiguous())
