"""Schedules: where in the model how many visual tokens stay, and what that costs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from codebook.errors import CodebookError
from codebook.pruning.methods import METHODS, Pruner

if TYPE_CHECKING:
    from codebook.pruning.hooks import Pruning

Keep = int | float


@dataclass(frozen=True)
class Stage:
    """From the input of one decoder layer on, only some visual tokens stay.

    Attributes
    ----------
    layer
        Decoder layer, 0-based, whose input loses the tokens; layers before it see them all. 0 prunes before the LLM.
    keep
        A float in (0, 1]: that fraction of each image's unpruned tokens, rounded, at least one. An int: that many
        tokens of each image.
    pruner
        Chooses the tokens.
    """

    layer: int
    keep: Keep
    pruner: Pruner

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise CodebookError(
                f"a stage's layer must be 0 (before the LLM) or a later decoder layer, not {self.layer}"
            )
        check_keep(self.keep)
        if self.layer == 0 and self.pruner.uses_attention:
            raise CodebookError(
                f"{type(self.pruner).__name__} needs the attention of the layer before: use it at layer 1 or later"
            )

    def count(self, total: int) -> int:
        """Tokens that stay of an image that had `total` unpruned."""
        if isinstance(self.keep, float):
            return max(1, round(self.keep * total))
        if self.keep > total:
            raise CodebookError(f"cannot keep {self.keep} tokens of an image that has {total}: lower the count")
        return self.keep


@dataclass(frozen=True)
class Schedule:
    """Stages of pruning, in the order of their layers.

    Use it as `with schedule(model): model.generate(**inputs)`.

    Attributes
    ----------
    stages
        In ascending order of layer.
    positions
        `keep`: kept tokens keep their original position ids. `compact`: tokens are renumbered without gaps.

    Notes
    -----
    The budget of a schedule is the number of visual tokens averaged over the decoder layers, as a fraction of the
    unpruned number: `schedule.budget(n, layers)`.
    """

    stages: Sequence[Stage]
    positions: Literal["keep", "compact"] = "keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if self.positions not in ("keep", "compact"):
            raise CodebookError(f"positions must be 'keep' or 'compact', not {self.positions!r}")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if after.layer <= before.layer:
                raise CodebookError(f"stages must be at ascending layers: {after.layer} follows {before.layer}")
            if type(after.keep) is type(before.keep) and after.keep > before.keep:
                raise CodebookError(
                    f"the stage at layer {after.layer} keeps more ({after.keep}) than the one before it "
                    f"({before.keep}): dropped tokens do not come back"
                )

    def __call__(self, model: Any) -> Pruning:
        """A context manager inside which the model's visual tokens are pruned; leaving it restores the model.

        Raises
        ------
        CodebookError
            If the model, its attention implementation or a stage's layer is not supported.
        """
        from codebook.pruning.hooks import Pruning

        return Pruning(model, self)

    def counts(self, n: int, layers: int) -> list[int]:
        """Visual tokens of an image of `n` that each of the decoder's `layers` layers sees."""
        self.check_layers(layers)
        now, out = n, []
        by_layer = {stage.layer: stage for stage in self.stages}
        for layer in range(layers):
            if layer in by_layer:
                now = by_layer[layer].count(n)
            out.append(now)
        return out

    def budget(self, n: int, layers: int) -> float:
        """Visual tokens averaged over the decoder layers, as a fraction of the unpruned `n`."""
        return sum(self.counts(n, layers)) / (n * layers)

    def flops(self, n: int, *, layers: int, hidden: int, intermediate: int) -> int:
        """Prefill FLOPs that an image's visual tokens cost (arXiv 2412.13180: 4nd^2 + 2n^2d + 2ndm a layer)."""
        return sum(
            4 * k * hidden**2 + 2 * k**2 * hidden + 2 * k * hidden * intermediate for k in self.counts(n, layers)
        )

    def check_layers(self, layers: int) -> None:
        for stage in self.stages:
            if stage.layer >= layers:
                raise CodebookError(
                    f"the schedule prunes at layer {stage.layer}, but the model has layers 0 to {layers - 1}"
                )

    @classmethod
    def parse(cls, text: str, make: Callable[[str], Pruner], **options: Any) -> Schedule:
        """Read the text form `method[@layer]:keep, ...`, as in `codebook:0.25, random@9:0.05`.

        A keep with a decimal point is a fraction of the image's tokens, one without is a count.

        Parameters
        ----------
        text
            The schedule.
        make
            Makes the pruner of a method's name.
        **options
            Further fields of the schedule.

        Raises
        ------
        CodebookError
            Naming the part that cannot be read.
        """
        stages = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*([a-z-]+)(?:@(\d+))?:(\d+|\d*\.\d+)\s*", part)
            if not match:
                raise CodebookError(f"cannot read schedule part {part.strip()!r}: write method[@layer]:keep")
            name, layer, keep = match.groups()
            if name not in METHODS:
                raise CodebookError(f"no method {name!r} in {part.strip()!r}: choose from {', '.join(METHODS)}")
            stages.append(Stage(int(layer or 0), float(keep) if "." in keep else int(keep), make(name)))
        return cls(stages, **options)


def check_keep(keep: Keep) -> None:
    """Raise unless `keep` is a fraction in (0, 1] or a count of at least 1."""
    fraction = isinstance(keep, float) and math.isfinite(keep) and 0 < keep <= 1
    count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not fraction and not count:
        raise CodebookError(f"keep must be a fraction in (0, 1] or a count of tokens, 1 or more; not {keep}")
