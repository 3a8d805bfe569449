"""Schedules: where in the model how many visual tokens stay, and what that costs."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from codebook import models
from codebook.errors import CodebookError, quoted
from codebook.models.base import Model
from codebook.pruning.budget import fit_schedule, fit_shares, shortest_share
from codebook.pruning.checks import check_schedule
from codebook.pruning.deep import deep_layer
from codebook.pruning.making import make_stages
from codebook.pruning.ownership import check_codebooks
from codebook.pruning.presets import DEFAULT, KEEP, SCHEDULE_PRESETS, expand
from codebook.pruning.schedule_file import read_schedule_text, write_schedule_text
from codebook.pruning.stage import Keep, Stage, check_keep
from codebook.pruning.text import (
    SETTINGS,
    UNPRUNED,
    ScheduleText,
    check_length,
    read_text,
    spell,
)
from codebook.store.codebook import Codebook
from codebook.store.known import find_named
from codebook.store.shipped import find_codebook

if TYPE_CHECKING:
    from codebook.pruning.engine.context import Pruning

FROM_TEXT = "make one of a text by Schedule.for_model(model, text, keep)"
"""What to do with a text in the place of a schedule."""


@dataclass(frozen=True)
class Schedule:
    """Stages of pruning, in the order of their layers.

    Use it as `with schedule(model): model.generate(**inputs)`. `str(schedule)` is its text, which `parse` reads.

    Attributes
    ----------
    stages
        In ascending order of layer.
    positions
        `keep`: kept tokens keep their original position ids. `compact`: tokens are renumbered without gaps.
    quotas
        How the quota of an image with several crops, or of a video, is divided. `each`: every crop or frame keeps the
        same share of its tokens. `shared`: they compete for the whole quota, as if they were one tall image.
    spread
        None: every image keeps as many tokens as the stages say. A number: images keep in proportion to their own
        spread (`codebook.store.spread`; with crops or frames, the mean over them), and an image with this spread keeps
        as many as the stages say; no image keeps less than half or more than twice as many. If the number is the mean
        over the images, as `Codebook.spread` is over a codebook's, the stages say what images keep on average.

    Notes
    -----
    The budget of a schedule is the number of visual tokens averaged over the decoder layers, as a fraction of the
    unpruned number: `schedule.budget(n, layers)`. With `spread` it is that of images with this spread, and an average
    over others.
    """

    stages: Sequence[Stage]
    positions: Literal["keep", "compact"] = "keep"
    quotas: Literal["each", "shared"] = "each"
    spread: float | None = None

    def __post_init__(self) -> None:
        stages = self.stages
        if not isinstance(stages, Sequence) or not all(isinstance(stage, Stage) for stage in stages):
            raise CodebookError(f"a Schedule is made of a list of Stages, not of {quoted(stages)}: {FROM_TEXT}")
        object.__setattr__(self, "stages", tuple(stages))
        check_schedule(self.stages, self.positions, self.quotas, self.spread)

    def __call__(self, model: Model, scope: Literal["model", "thread"] = "model") -> Pruning:
        """A context manager inside which the model's visual tokens are pruned; leaving it restores the model.

        Parameters
        ----------
        scope
            `model`: all calls of the model that start while the context is open are pruned, whatever their thread.
            `thread`: only those of the thread, or asyncio task, that opens it; so different schedules and plain calls
            run side by side on one model.

        Raises
        ------
        CodebookError
            If the model, its attention implementation or a stage's layer is not supported, or a stage's codebook was
            built for another model. A codebook without a fingerprint, such as an imported one, is not checked.
        """
        from codebook.pruning.engine.context import Pruning

        model = models.unwrap(model)
        pruning = Pruning(model, self, scope)
        check_codebooks(model, (stage.pruner for stage in self.stages))
        return pruning

    @classmethod
    def of(cls, given: object) -> Schedule:
        """What was `given` as a schedule: itself, or `Schedule([])` for None; raises a CodebookError for all else."""
        if given is None:
            return cls([])
        if not isinstance(given, cls):
            raise CodebookError(f"a schedule is a Schedule, not {quoted(given)}: {FROM_TEXT}")
        return given

    def __repr__(self) -> str:
        if not self.stages:
            return f"<Schedule {str(self)!r}: keeps all visual tokens>"
        first, *others = (stage.effect() for stage in self.stages)
        amount, place = first
        kept = ", ".join([f"{amount} of an image's visual tokens {place}", *(" ".join(other) for other in others)])
        mass = "; kept tokens stand for dropped ones" if any(stage.mass for stage in self.stages) else ""
        return f"<Schedule {str(self)!r}: keeps {kept}{mass}>"

    def __str__(self) -> str:
        text = ", ".join(map(str, self.stages)) or UNPRUNED
        changed = [f"{key}={value}" for key in SETTINGS if (value := getattr(self, key)) != SETTINGS[key]]
        return "; ".join([text, *changed])

    @property
    def adaptive(self) -> bool:
        """Whether a stage decides for each image how many tokens stay: then costs are known only after running."""
        return any(stage.adaptive for stage in self.stages)

    @property
    def varies(self) -> bool:
        """Whether images of one size keep different numbers of tokens: what one costs is known only after running."""
        return self.adaptive or self.spread is not None or any(stage.joint for stage in self.stages)

    def counts(self, n: int, layers: int) -> list[int]:
        """Visual tokens of an image of `n`, of the usual spread, that each of the decoder's `layers` layers sees.

        Raises
        ------
        CodebookError
            If a stage keeps more than there are, is at none of these layers, or decides its number by the image.
        """
        self.check_layers(layers)
        now, out = n, []
        by_layer = {stage.layer: stage for stage in self.stages}
        for layer in range(layers):
            if layer in by_layer:
                count = by_layer[layer].count(n)
                if count > now:
                    raise CodebookError(
                        f"the stage at layer {layer} keeps {count} visual tokens, but only {now} are left: "
                        "dropped tokens do not come back"
                    )
                now = count
            out.append(now)
        return out

    def budget(self, n: int, layers: int) -> float:
        """Visual tokens averaged over the decoder layers, as a fraction of the unpruned `n`."""
        return sum(self.counts(n, layers)) / (n * layers)

    def kv_bytes(
        self,
        n: int,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        bytes: int = 2,
        attending: Container[int] | None = None,
    ) -> int:
        """Bytes of an image's `n` visual tokens in the KV cache of a decoder; raises as `counts` does.

        Parameters
        ----------
        layers, kv_heads, head_dim
            The decoder's layers, heads of keys, and their width; `codebook.models.shape` has them.
        bytes
            Size of a number; 2 is half precision.
        attending
            Layers that have a cache; default: all.
        """
        stored = sum(k for i, k in enumerate(self.counts(n, layers)) if attending is None or i in attending)
        return 2 * kv_heads * head_dim * bytes * stored

    def flops(
        self,
        n: int,
        *,
        layers: int,
        hidden: int,
        intermediate: int,
        text: int = 0,
        attending: Container[int] | None = None,
        reusing: Container[int] = (),
    ) -> int:
        """Prefill FLOPs of an image's `n` tokens and `text` others; raises as `counts` does.

        By the formula of arXiv 2412.13180: 4nd^2 + 2n^2d + 2ndm per layer, d being `hidden` and m `intermediate`.

        Parameters
        ----------
        layers, hidden, intermediate
            The decoder's layers, their width and that of their feed-forward; `codebook.models.shape` has them.
        text
            Tokens of the prompt beside the image.
        attending
            Layers with the term 2n^2d; default: all.
        reusing
            Layers that use the keys and values of earlier ones, and run on the last token of the text alone, as
            `generate` runs them: 2d^2 + 2nd + 2dm each, nothing without text.
        """
        total = 0
        for i, k in enumerate(visual + text for visual in self.counts(n, layers)):
            if i in reusing:
                total += min(text, 1) * 2 * hidden * (hidden + k + intermediate)
            else:
                total += 4 * k * hidden**2 + 2 * k * hidden * intermediate
                total += 2 * k**2 * hidden if attending is None or i in attending else 0
        return total

    def flops_reduction(self, n: int, **shape: Any) -> float:
        """The fraction of those FLOPs that pruning saves; takes `n` and the decoder's `shape` as `flops` does."""
        return 1 - self.flops(n, **shape) / Schedule([]).flops(n, **shape)

    def check_layers(self, layers: int) -> None:
        """Raise a CodebookError if a stage is at none of the decoder's `layers` layers."""
        for stage in self.stages:
            if stage.layer >= layers:
                raise CodebookError(
                    f"the schedule prunes at layer {stage.layer}, but the model has layers 0 to {layers - 1}"
                )

    def fit(self, keep: Keep, *, n: int, layers: int) -> Schedule:
        """The same stages with the counts that meet a budget.

        Keeps that are fractions give the proportions: all are scaled by one factor, but to no more than all tokens and
        no fewer than one. Keeps that are counts stay. A schedule that only drops all tokens moves its layer instead.

        Parameters
        ----------
        keep
            The budget: visual tokens averaged over the decoder layers, as a fraction of `n` or as a number. The result
            never exceeds it, and with one token more in each scaled stage it would.
        n
            Visual tokens of an image, unpruned.
        layers
            Number of decoder layers.

        Raises
        ------
        CodebookError
            If no factor meets the budget: says which budgets can be met.
        """
        return fit_schedule(self, keep, n, layers)

    def shares(self, n: int) -> Schedule:
        """The same counts of an image of `n` tokens as fractions, the shortest ones: other images keep their share."""
        stages = [replace(stage, keep=shortest_share(stage.keep, n)) if stage.keep else stage for stage in self.stages]
        return replace(self, stages=stages)

    @classmethod
    def parse(cls, text: str, codebook: Codebook | None = None, seed: int = 0) -> Schedule:
        """Read the text form `method[(option=value)][@layer][:keep], ...`, as in `codebook:0.25, random@9:0.05+mass`.

        A keep with a decimal point is a fraction of the image's tokens, one without is a count.

        Parameters
        ----------
        text
            The schedule, as `codebook.pruning.text` describes it.
        codebook
            Prototypes for the stages whose methods need them; no text holds them.
        seed
            Seed of methods that draw at random, where the text says none.

        Raises
        ------
        CodebookError
            Naming the part that cannot be read.
        """
        if check_length(text).partition(";")[0].strip() in SCHEDULE_PRESETS:
            raise CodebookError(
                f"preset {quoted(text)} depends on the model: use Schedule.solve, which takes its n and layers"
            )
        return cls._made(read_text(text, others=SCHEDULE_PRESETS), codebook, seed)

    @classmethod
    def solve(
        cls,
        text: str,
        codebook: Codebook | None = None,
        *,
        n: int,
        layers: int,
        keep: Keep | None = None,
        horizon: int | None = None,
        deep: int | None = None,
        seed: int = 0,
    ) -> Schedule:
        """A preset, a hybrid or any schedule's text for a model, with the counts that meet a budget.

        Parameters
        ----------
        text
            As in `codebook+random`, `pyramiddrop`, `fastv@3:1.0`; see `codebook.pruning.presets`.
        codebook
            Prototypes for the stages whose methods need them.
        n
            Visual tokens of an image, unpruned.
        layers
            Number of decoder layers.
        keep
            The budget, as `fit` takes it; None leaves the keeps as the text or the preset's authors have them.
        horizon
            Layer of a hybrid's second stage, or of `vtw`; default: 20 of 32, 21 to drop all, 16 for `vtw`. These are
            LLaVA-1.5-7B's and a guess for other models: measure yours (docs/horizon.md).
        deep
            Tokens of a hybrid's second stage; default: 1/7 of the first's.
        seed
            Seed of methods that draw at random, where the text says none.

        Raises
        ------
        CodebookError
            If the text cannot be read or the budget cannot be met.
        """
        schedule, needs_budget = cls.draft(
            text, codebook, layers=layers, horizon=horizon, deep=deep, budget=_share(keep, n), seed=seed
        )
        if keep is not None:
            return schedule.fit(keep, n=n, layers=layers)
        if needs_budget:
            raise CodebookError(
                f"{quoted(text)} needs a budget: say how many visual tokens stay, averaged over the layers"
            )
        return schedule

    @classmethod
    def draft(
        cls,
        text: str,
        codebook: Codebook | None = None,
        *,
        layers: int,
        horizon: int | None = None,
        deep: int | None = None,
        budget: float | None = None,
        seed: int = 0,
    ) -> tuple[Schedule, bool]:
        """The schedule that `solve` starts from, and whether its keeps are proportions only, which need a budget.

        Parameters
        ----------
        text, codebook, layers, horizon, deep, seed
            As `solve` takes them.
        budget
            The one that it will be fitted to, as a fraction: `codebook.pruning.presets.expand`.
        """
        written, needs_budget = expand(text, layers, horizon, deep, budget)
        return cls._made(written, codebook, seed), needs_budget

    @classmethod
    def for_model(
        cls,
        model: Model,
        text: str = DEFAULT,
        keep: Keep | None = None,
        codebook: Codebook | Path | str | None = None,
        *,
        seed: int = 0,
    ) -> Schedule:
        """The schedule that a text says for a loaded model, as `codebook prune` has it.

        Parameters
        ----------
        model
            Any supported model.
        text
            A schedule's text, a preset or a hybrid, as `solve` takes it. Where a hybrid names no layer for its second
            stage, it is the measured one, if a `horizon.json` of this model is in the codebook's folder or ships; else
            the scaled default, which is logged as a guess. So is the layer of `vtw` without a keep.
        keep
            The budget, as `fit` takes it. A fraction holds for images of every size: counts that the text leaves to the
            budget become shares. Default: 0.2 where the text leaves its keep to the budget, else what the text says.
        codebook
            Prototypes for the stages whose methods need them: a codebook, its folder, or a name that `codebook list`
            shows; checked to be this model's. Default: the model's own (`codebook.prebuilt`).
        seed
            Seed of methods that draw at random, where the text says none.

        Raises
        ------
        CodebookError
            If the text cannot be read, the budget cannot be met, the codebook is missing or another model's, or the
            model was measured to read its images to the last layer where a horizon is needed.
        """
        if keep is not None:
            check_keep(keep)
        size = models.shape(model)
        horizon = deep_layer(model, text, keep is not None, codebook)
        written, needs_budget = expand(text, size.layers, horizon, budget=_share(keep, size.tokens))
        schedule = cls._made(written, find_codebook(model, codebook) if written.needs_codebook else None, seed)
        if keep is None and not needs_budget:
            return schedule
        return schedule.fit_images(KEEP if keep is None else keep, size.tokens, size.layers)

    def fit_images(self, keep: Keep, n: int, layers: int) -> Schedule:
        """The same as `fit`; where the budget is a share, images of other sizes keep it, too.

        Its stages are then shares, but for those whose keep is a count already. Takes `keep`, `n` and `layers` as
        `fit` does, and raises as it does.
        """
        return fit_shares(self, keep, n, layers)

    @classmethod
    def _made(cls, written: ScheduleText, codebook: Codebook | None, seed: int) -> Schedule:
        """The schedule of a text that can be read, its pruners made with one codebook."""
        stages, settings = make_stages(written, codebook, seed)
        return cls(stages, **settings)

    def save(self, path: Path | str) -> None:
        """Write the schedule to the small JSON file `path`, which `load` and `codebook prune --schedule` read.

        Prototypes are no part of it: `load` takes the codebook or finds the model's.

        Raises
        ------
        CodebookError
            If a pruner is of none of `METHODS`, or the file cannot be written.
        """
        for stage in self.stages:
            if stage.keep != 0 and spell(stage.pruner) is None:
                raise CodebookError(f"{stage.pruner!r} has no text form: only methods of METHODS can be saved")
        write_schedule_text(path, str(self))

    @classmethod
    def load(
        cls,
        path: Path | str,
        codebook: Codebook | Path | str | None = None,
        *,
        model: Model | None = None,
        seed: int = 0,
    ) -> Schedule:
        """Read what `save` wrote.

        Parameters
        ----------
        path
            The JSON file.
        codebook
            Prototypes for the stages whose methods need them, their folder, or a name that `codebook list` shows.
        model
            The model to prune: its own codebook is found where none is given, and one that is given is checked.
        seed
            Seed of methods that draw at random, where the file says none.

        Raises
        ------
        CodebookError
            If the file cannot be read or holds no schedule, or the codebook is missing or another model's.
        """
        text = read_schedule_text(path)
        if model is not None:
            return cls.for_model(model, text, codebook=codebook, seed=seed)
        return cls.parse(
            text, Codebook.load(find_named(codebook)) if isinstance(codebook, (Path, str)) else codebook, seed
        )


def _share(keep: Keep | None, n: int) -> float | None:
    """A budget as a fraction of `n` tokens."""
    return keep / n if isinstance(keep, int) else keep
