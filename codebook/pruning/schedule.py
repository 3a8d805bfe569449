"""Schedules: where in the model how many visual tokens stay, and what that costs."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from codebook.errors import CodebookError
from codebook.pruning import presets
from codebook.pruning.methods import Pruner
from codebook.pruning.stage import Keep, Stage, check_keep
from codebook.pruning.text import CODEBOOK, DROP, SETTINGS, UNPRUNED, Make, Part, make, read, spell

if TYPE_CHECKING:
    from codebook.pruning.engine.context import Pruning

FORMAT = 1


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
        Of images with several crops and of videos, whose quota is that of all their visual tokens. `each`: every crop
        or frame keeps the same share. `shared`: they compete for it, as if they were one tall image.
    spread
        None: every image keeps what the stages say. A number: images keep in proportion to their spread
        (`codebook.store.spread`; of crops and frames, their mean), and one with this spread keeps what the stages say;
        none less than half of that or more than twice. Where it is the images' mean spread, as `Codebook.spread` is of
        those of a codebook, the stages say what images keep on average.

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
        object.__setattr__(self, "stages", tuple(self.stages))
        if self.positions not in ("keep", "compact"):
            raise CodebookError(f"positions must be 'keep' or 'compact', not {self.positions!r}")
        if self.quotas not in ("each", "shared"):
            raise CodebookError(f"quotas must be 'each' or 'shared', not {self.quotas!r}")
        if self.spread is not None and not 0 < self.spread < math.inf:
            raise CodebookError(f"spread must be a number above 0, the usual spread of images, not {self.spread}")
        if self.spread is not None and self.adaptive:
            raise CodebookError("a stage decides how many tokens stay of each image: leave spread out")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if after.layer <= before.layer:
                raise CodebookError(f"stages must be at ascending layers: {after.layer} follows {before.layer}")
            if before.keep == 0:
                raise CodebookError(f"nothing is left for the stage at layer {after.layer}: leave it out")
            if before.keep and type(after.keep) is type(before.keep) and after.keep > before.keep:
                raise CodebookError(
                    f"the stage at layer {after.layer} keeps more ({after.keep}) than the one before it "
                    f"({before.keep}): dropped tokens do not come back"
                )

    def __call__(self, model: Any, scope: Literal["model", "thread"] = "model") -> Pruning:
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
            If the model, its attention implementation or a stage's layer is not supported.
        """
        from codebook.pruning.engine.context import Pruning

        return Pruning(model, self, scope)

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
        return self.adaptive or self.spread is not None

    def counts(self, n: int, layers: int) -> list[int]:
        """Visual tokens of an image of `n`, of the usual spread, that each of the decoder's `layers` layers sees."""
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

    def kv_bytes(self, n: int, *, layers: int, kv_heads: int, head_dim: int, bytes: int = 2) -> int:
        """Bytes of an image's visual tokens in the KV cache, at `bytes` a number (2: half precision)."""
        return 2 * kv_heads * head_dim * bytes * sum(self.counts(n, layers))

    def flops(self, n: int, *, layers: int, hidden: int, intermediate: int, text: int = 0) -> int:
        """Prefill FLOPs of an image's tokens and `text` others (arXiv 2412.13180: 4nd^2 + 2n^2d + 2ndm a layer)."""
        return sum(
            4 * k * hidden**2 + 2 * k**2 * hidden + 2 * k * hidden * intermediate
            for k in (visual + text for visual in self.counts(n, layers))
        )

    def flops_reduction(self, n: int, *, layers: int, hidden: int, intermediate: int, text: int = 0) -> float:
        """The fraction of those FLOPs that pruning saves."""
        shape = {"layers": layers, "hidden": hidden, "intermediate": intermediate, "text": text}
        return 1 - self.flops(n, **shape) / Schedule([]).flops(n, **shape)

    def check_layers(self, layers: int) -> None:
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
            Of the decoder.

        Raises
        ------
        CodebookError
            If no factor meets the budget: says which budgets can be met.
        """
        check_keep(keep)
        self.check_layers(layers)
        if self.adaptive:
            raise CodebookError(f"'{self}' decides how many tokens stay: it cannot be fitted to a budget")
        # In units of one token in one layer. What a float lacks of a whole number by its rounding is no shortfall.
        room = math.floor((keep * n if isinstance(keep, float) else keep) * layers + 1e-6)
        if len(self.stages) == 1 and self.stages[0].keep == 0:
            self._check_reach(keep, room, n, n * (layers - 1), n * layers)
            return replace(self, stages=[replace(self.stages[0], layer=room // n)])
        fractions = [stage.keep for stage in self.stages if isinstance(stage.keep, float)]
        if not fractions:
            raise CodebookError(f"'{self}' has no fraction to scale, and counts stay: write a share, as in method:1.0")

        def scaled(t: int) -> Schedule:
            return replace(self, stages=_scaled(self.stages, n, t))

        def total(t: int) -> int:
            return sum(scaled(t).counts(n, layers))

        most = math.ceil(n * fractions[0] / min(fractions)) + 1
        self._check_reach(keep, room, total(1), total(most), n * layers)
        return scaled(bisect.bisect_right(range(1, most + 1), room, key=total))

    def _check_reach(self, keep: Keep, room: int, least: int, most: int, whole: int) -> None:
        if not least <= room <= most:
            low, high = math.ceil(10**4 * least / whole) / 10**4, math.floor(10**4 * most / whole) / 10**4
            raise CodebookError(
                f"keep {keep} is out of reach of '{self}': choose from {low:g} to {high:g}, averaged over the layers"
            )

    def shares(self, n: int) -> Schedule:
        """The same counts of an image of `n` tokens as fractions, the shortest ones: other images keep their share."""
        stages = [replace(stage, keep=_share(stage.keep, n)) if stage.keep else stage for stage in self.stages]
        return replace(self, stages=stages)

    @classmethod
    def parse(cls, text: str, make: Make = make) -> Schedule:
        """Read the text form `method[(option=value)][@layer][:keep][+mass], ...`, as in `codebook:0.25, random@9:0.05`.

        A keep with a decimal point is a fraction of the image's tokens, one without is a count.

        Parameters
        ----------
        text
            The schedule, as `codebook.pruning.text` describes it.
        make
            Makes the pruner of a method's name; needed for `codebook`, whose prototypes no text holds.

        Raises
        ------
        CodebookError
            Naming the part that cannot be read.
        """
        if text.partition(";")[0].strip() in presets.PRESETS:
            raise CodebookError(
                f"preset {text!r} depends on the model: use Schedule.solve, which takes its n and layers"
            )
        return cls._of(*read(text, make, others=presets.PRESETS))

    @classmethod
    def solve(
        cls,
        text: str,
        make: Make = make,
        *,
        n: int,
        layers: int,
        keep: Keep | None = None,
        horizon: int | None = None,
        deep: int | None = None,
    ) -> Schedule:
        """A preset, a hybrid or any schedule's text for a model, with the counts that meet a budget.

        Parameters
        ----------
        text
            As in `codebook+random`, `pyramiddrop`, `fastv@3:1.0`; see `codebook.pruning.presets`.
        make
            Makes the pruner of a method's name; needed for `codebook`.
        n
            Visual tokens of an image, unpruned.
        layers
            Of the decoder.
        keep
            The budget, as `fit` takes it; None leaves the keeps as the text or the preset's authors have them.
        horizon
            Layer of a hybrid's second stage; default: 20 of 32, or 21 of 32 to drop all.
        deep
            Tokens of a hybrid's second stage; default: 1/7 of the first's.

        Raises
        ------
        CodebookError
            If the text cannot be read or the budget cannot be met.
        """
        schedule, open_ = cls.draft(text, make, layers, horizon, deep)
        if keep is not None:
            return schedule.fit(keep, n=n, layers=layers)
        if open_:
            raise CodebookError(f"{text!r} needs a budget: say how many visual tokens stay, averaged over the layers")
        return schedule

    @classmethod
    def draft(
        cls, text: str, make: Make, layers: int, horizon: int | None = None, deep: int | None = None
    ) -> tuple[Schedule, bool]:
        """What `solve` starts from, and whether its keeps are proportions only, which need a budget."""
        parts, settings, open_ = presets.expand(text, make, layers, horizon, deep)
        return cls._of(parts, settings), open_

    @classmethod
    def _of(cls, parts: Sequence[Part], settings: dict[str, Any]) -> Schedule:
        stages = []
        if settings.get("spread") == CODEBOOK:
            settings = settings | {"spread": _spread([part.pruner for part in parts])}
        for part in parts:
            if part.method == DROP and (not part.layer or part.keep):
                part.fail("drop needs a layer, 1 or later, and keeps nothing: write drop@21")
            try:
                keep = 0 if part.method == DROP else part.keep
                stages.append(Stage(part.layer or 0, keep, part.pruner, part.mass))
            except CodebookError as error:
                part.fail(str(error))
        return cls(stages, **settings)

    def save(self, path: Path | str) -> None:
        """Write the schedule to a small JSON file, which `load` and `codebook prune --schedule` read."""
        for stage in self.stages:
            if stage.keep != 0 and spell(stage.pruner) is None:
                raise CodebookError(f"{stage.pruner!r} has no text form: only methods of METHODS can be saved")
        Path(path).write_text(json.dumps({"format": FORMAT, "schedule": str(self)}) + "\n")

    @classmethod
    def load(cls, path: Path | str, make: Make = make) -> Schedule:
        """Read what `save` wrote."""
        return cls.parse(load_text(path), make)


def _scaled(stages: Sequence[Stage], n: int, t: int) -> list[Stage]:
    """The stages with the first fraction scaled to `t` of `n` tokens and the others by the same factor.

    Increasing in `t`, and by no more than one token a stage for each: fractions do not increase from stage to stage.
    """
    # What an author writes as 1/3 or 0.3333, exactly: nothing depends on the rounding of floats.
    shares = [Fraction(s.keep).limit_denominator(10**6) if isinstance(s.keep, float) else None for s in stages]
    first = next(share for share in shares if share)
    out, most = [], n
    for i, (stage, share) in enumerate(zip(stages, shares, strict=True)):
        if share:
            least = max([1, *(after.keep for after in stages[i:] if isinstance(after.keep, int))])
            stage = replace(stage, keep=min(most, max(least, math.floor(t * share / first + Fraction(1, 2)))))
        out.append(stage)
        most = stage.count(n)
    return out


def _spread(pruners: Sequence[Pruner]) -> float | None:
    """What the pruners' codebook says; None if the schedule is only checked and there is none yet."""
    books = [pruner.codebook for pruner in pruners if hasattr(pruner, "codebook")]
    if not books:
        raise CodebookError("no stage has a codebook that could say the usual spread: write it, as in spread=0.2")
    if books[0] is not None and books[0].spread is None:
        raise CodebookError("the codebook does not say the spread of its images: build it again with this version, or "
                            "write the usual spread, as in spread=0.2")  # fmt: skip
    return None if books[0] is None else float(books[0].spread)


def _share(keep: Keep, n: int) -> float:
    if isinstance(keep, float):
        return keep
    return next(share for digits in range(3, 17) if round((share := round(keep / n, digits)) * n) == keep)


def load_text(path: Path | str) -> str:
    """The text of a schedule that `Schedule.save` wrote."""
    try:
        record = json.loads(Path(path).read_text())
        version, text = record["format"], record["schedule"]
        if not isinstance(text, str):
            raise ValueError
    except (OSError, UnicodeDecodeError) as error:
        raise CodebookError(f"cannot read schedule {path}: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise CodebookError(
            f'{path} is no schedule: it should hold {{"format": {FORMAT}, "schedule": "..."}}'
        ) from None
    if version != FORMAT:
        raise CodebookError(f"{path} has schedule format {version!r}; this version reads format {FORMAT}")
    return text
