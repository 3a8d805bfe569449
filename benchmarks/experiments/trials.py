"""What `experiments.py` tries: choices of tokens, and codebooks built in other ways, that are no methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from codebook import Codebook, Pruner, SeededFarthestPoint, VisualTokens, build, miniature, models
from codebook.building.pool import SurvivorPool
from codebook.building.presets import preset
from codebook.cli.output import progress
from codebook.miniature.samples import of_miniature
from codebook.pruning.methods.anchorprune import AnchorPrune, in_anchor
from codebook.pruning.methods.base import FramePruner, group_means, middles, nearest_kept, unit_range, whole_frames
from codebook.pruning.methods.combine import Combination
from codebook.pruning.methods.farthest import farthest_in_turn, farthest_points
from codebook.pruning.methods.question import likeness_to_question
from codebook.pruning.methods.vidcom2 import divided

IMAGES = 120
"""Training scenes of each codebook: those of the one that ships."""
QUESTIONS = {"count": "how many objects are there?", "read": "read the number."}
BOOKS = ("no isolation", "no recurrence", "neither", "count too", "count and read too")


@dataclass(frozen=True)
class Merged(Combination):
    """What a pruner keeps, each token the average of itself and the dropped ones most like it."""

    pruner: Pruner

    @property
    def parts(self) -> tuple[Pruner]:
        return (self.pruner,)

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        return self.pruner.select(tokens, keep)

    def merge(self, tokens: VisualTokens, index: Tensor) -> Tensor:
        return group_means(tokens.hidden, nearest_kept(tokens.hidden, index), len(index))


@dataclass(frozen=True)
class ByGain(Pruner):
    """`SeededFarthestPoint` whose second half is representatives while one stands for `gain` of the image, else points.

    The gain of a representative is the mean, over all tokens, of what it adds to the highest similarity to a kept one.
    """

    codebook: Codebook
    gain: float

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        unit = normalize(tokens.features.float(), dim=-1)
        similarity, nearest = unit @ unit.T, self.codebook.redundancy(tokens.features)
        covered = torch.full_like(nearest, -1.0)
        chosen: list[int] = []
        for i in range(keep):
            gain = (similarity - covered).clamp(min=0).mean(1)
            gain[chosen] = -1.0
            stands = i >= keep - keep // 2 and gain.max() > self.gain
            pick = int(gain.argmax() if stands else nearest.argmin())
            nearest = torch.maximum(nearest, similarity[pick])
            covered = torch.maximum(covered, similarity[pick])
            chosen.append(pick)
            nearest[chosen] = torch.inf
        return torch.tensor(sorted(chosen))


@dataclass(frozen=True)
class Gated(SeededFarthestPoint):
    """`SeededFarthestPoint` whose distances count times the distance from everything redundant, to the `power`."""

    power: float = 1.0

    def _view(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        similarity, redundancy, _ = super()._view(features)
        return similarity, redundancy, (1 - redundancy).clamp(min=0) ** self.power


@dataclass(frozen=True)
class Asked(Pruner):
    """`SeededFarthestPoint` whose distances count times the tokens' relevance to the question, to the `power`.

    The relevance is CDPruner's: cosine similarity of what enters the LLM to the mean of the question's word embeddings,
    or of `words` (w, d), the same for every question, scaled to [0, 1] in the image. With `middle` what is chosen gives
    way to the middle of its group.
    """

    codebook: Codebook
    power: float
    words: Tensor | None = None
    representatives: int = 4
    middle: bool = False
    uses_text: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        words = tokens.sequence[tokens.question] if self.words is None else self.words
        weight = unit_range(cosine_similarity(tokens.hidden.float(), words.float().mean(0)[None])) ** self.power
        unit = normalize(tokens.features.float(), dim=-1)
        similarity, nearest = unit @ unit.T, self.codebook.redundancy(tokens.features)
        chosen: list[int] = []
        while len(chosen) < keep - min(self.representatives, keep // 2):
            far = (1 - nearest) * weight
            far[chosen] = -1.0
            chosen.append(int(far.argmax()))
            nearest = torch.maximum(nearest, similarity[chosen[-1]])
        chosen = _represented(similarity, chosen, keep, torch.ones(len(unit)))
        return _to_middles(tokens.features, chosen) if self.middle else torch.tensor(sorted(chosen))


@dataclass(frozen=True)
class Demanded(Pruner):
    """`SeededFarthestPoint(middle=True)` whose representatives stand for what demands it.

    A token's demand is its distance from everything redundant, to the `power`: all demand the same where it is 0.
    """

    codebook: Codebook
    power: float
    representatives: int = 4

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        unit = normalize(tokens.features.float(), dim=-1)
        similarity, nearest = unit @ unit.T, self.codebook.redundancy(tokens.features)
        demand = (1 - nearest).clamp(min=0) ** self.power
        points = keep - min(self.representatives, keep // 2)
        chosen = farthest_in_turn(similarity[None], nearest[None], points)[0].tolist()
        return _to_middles(tokens.features, _represented(similarity, chosen, keep, demand))


@dataclass(frozen=True)
class Anchored(Pruner):
    """`SeededFarthestPoint(middle=True)` around what the question asks for: `AnchorPrune`'s anchor of adaptive size.

    The anchor has no more than `most` of what stays and counts as chosen. It stays as it is; what is chosen after it
    gives way to the middle of its group.
    """

    codebook: Codebook
    most: float
    representatives: int = 4
    uses_text: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        ranked = likeness_to_question(tokens).argsort(descending=True, stable=True)
        unit = normalize(tokens.features.float(), dim=-1)
        similarity = unit @ unit.T
        least = max(1, round(AnchorPrune.least * keep * self.most / AnchorPrune.most))
        ranked = ranked[: max(least, int(self.most * keep))]
        defaults = AnchorPrune.novel, AnchorPrune.novelties
        anchor = ranked[in_anchor(similarity[ranked][:, ranked], least, *defaults)]
        nearest = torch.maximum(self.codebook.redundancy(tokens.features), similarity[:, anchor].amax(1))
        points = keep - len(anchor) - min(self.representatives, keep // 2, keep - len(anchor))
        nearest = nearest.index_fill(0, anchor, torch.inf)
        others = farthest_in_turn(similarity[None], nearest[None], points)[0]
        chosen = _represented(similarity, [*anchor.tolist(), *others.tolist()], keep, torch.ones_like(nearest))
        return _to_middles(tokens.features, chosen, len(anchor))


def _represented(similarity: Tensor, chosen: list[int], keep: int, demand: Tensor) -> list[int]:
    """The chosen tokens and, up to `keep`, those that stand for the others, each by what it demands."""
    chosen = list(chosen)
    while len(chosen) < keep:
        gain = (similarity - similarity[chosen].amax(0)).clamp(min=0) @ demand
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
    return chosen


def _to_middles(features: Tensor, chosen: list[int], fixed: int = 0) -> Tensor:
    """(keep,) the middles of the chosen tokens' groups; the first `fixed` stay as they are."""
    index = torch.tensor(chosen)
    moved = middles(nearest_kept(features, index), len(chosen))
    moved[:fixed] = index[:fixed]
    return moved.sort().values


@dataclass(frozen=True)
class Film(FramePruner):
    """`SeededFarthestPoint` of a film's frames; only before any other stage.

    Attributes
    ----------
    codebook
        Prototypes, which count as chosen.
    counted
        What else counts as chosen for the tokens of a frame, beside what is kept of it. `kept`: all that earlier frames
        keep. `place`: the token at the same place of the frame before. `near`: the nine around it. Anything else:
        nothing.
    joint
        Whether all tokens of the film compete for one budget, and with `kept` all frames count for each other.
    shares
        How frames share the budget where they do not compete. `change`: in proportion to how much each differs from
        the one before, by mean cosine distance; the first counts as the others' mean. `ends`: the first and the last
        have all. Anything else: equally.
    representatives
        As in `SeededFarthestPoint`, of each frame.
    """

    codebook: Codebook
    counted: str = ""
    joint: bool = False
    shares: str = ""
    representatives: int = 4

    def select_frames(self, frames: Sequence[VisualTokens], keep: int) -> list[Tensor]:
        x, grid = whole_frames(frames), frames[0].grid
        count, size = x.shape[:2]
        unit = normalize(x, dim=-1)
        nearest = self.codebook.redundancy(x)
        similarity = (unit.flatten(0, 1) @ unit.flatten(0, 1).T).unflatten(0, (count, size)).unflatten(2, (count, size))
        if self.counted in ("place", "near"):
            counts = around(grid, 0 if self.counted == "place" else 1)
            for t in range(1, count):
                before = similarity[t, :, t - 1].masked_fill(~counts, -1).amax(1)
                nearest[t] = torch.maximum(nearest[t], before)
        if self.joint:
            if self.counted != "kept":
                similarity = similarity.clone()
                for t in range(count):
                    similarity[t, :, :t] = similarity[t, :, t + 1 :] = -1
            every = similarity.reshape(1, count * size, count * size)
            kept = farthest_points(every, nearest.flatten()[None], keep, self.representatives * count)[0]
            return [kept[kept // size == t] - t * size for t in range(count)]
        chosen: list[Tensor] = []
        for t, own in enumerate(divided(keep, self._weights(unit), [size] * count)):
            if not own:
                chosen.append(torch.arange(0))
                continue
            near = nearest[t]
            if self.counted == "kept" and t:
                near = torch.maximum(near, torch.cat([similarity[t, :, s, chosen[s]] for s in range(t)], 1).amax(1))
            within = similarity[t, :, t].contiguous()
            chosen.append(farthest_points(within[None], near[None], own, self.representatives)[0])
        return chosen

    def _weights(self, unit: Tensor) -> list[float]:
        count = len(unit)
        if self.shares == "ends":
            return [1.0 if t in (0, count - 1) else 1e-9 for t in range(count)]
        if self.shares != "change" or count == 1:
            return [1.0] * count
        change = 1 - (unit[1:] * unit[:-1]).sum(-1).mean(1)
        return torch.cat([change.mean()[None], change]).clamp(min=1e-6).tolist()


def around(grid: tuple[int, int], reach: int) -> Tensor:
    """(n, n) bool: which tokens of a grid are no more than `reach` rows and columns from each."""
    row, column = torch.arange(grid[0] * grid[1]) // grid[1], torch.arange(grid[0] * grid[1]) % grid[1]
    return ((row[:, None] - row).abs() <= reach) & ((column[:, None] - column).abs() <= reach)


FILMS = {
    "kept": {"counted": "kept"},
    "place": {"counted": "place"},
    "near": {"counted": "near"},
    "kept joint": {"counted": "kept", "joint": True},
    "joint": {"joint": True},
    "place joint": {"counted": "place", "joint": True},
    "near joint": {"counted": "near", "joint": True},
    "by change": {"shares": "change"},
    "ends": {"shares": "ends"},
}
"""What is tried with films, by what the rows of `experiments.py` call it."""


@dataclass(frozen=True)
class ByImage(Pruner):
    """`SeededFarthestPoint` that keeps more of images whose tokens differ more.

    The number is `keep` times the image's `signal` over `usual` to the `power`, between half and twice `keep`; `usual`
    is what makes the mean over images `keep`.
    """

    pruner: SeededFarthestPoint
    keep: int
    signal: str
    power: float
    usual: float
    adaptive: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        return self.pruner.select(tokens, keep)

    def choose(self, tokens: VisualTokens) -> Tensor:
        own = SIGNALS[self.signal](tokens.features.float(), self.pruner.codebook)
        return self.select(tokens, int(counts(own[None], self.keep, self.power, self.usual)))


def counts(signal: Tensor, keep: int, power: float, usual: float) -> Tensor:
    """Tokens that `ByImage` keeps of images with these signals."""
    return (keep * (signal / usual) ** power).clamp(keep / 2, keep * 2).round().long()


def _scores(features: Tensor, book: Codebook) -> Tensor:
    return book.redundancy(features).std()


def _centre(features: Tensor, book: Codebook) -> Tensor:
    return cosine_similarity(features, features.mean(0, keepdim=True)).std()


def _dispersion(features: Tensor, book: Codebook) -> Tensor:
    return 1 - normalize(features, dim=-1).mean(0).square().sum()


SIGNALS = {"scores": _scores, "centre": _centre, "dispersion": _dispersion}
"""What differs between an image's tokens: their redundancy scores, their likeness to their mean, their directions."""


@cache
def by_image(model: Any, processor: Any, book: Codebook, keep: int, signal: str, power: float) -> ByImage:
    """`ByImage` whose mean is `keep` on 200 scenes of the training split that no experiment asks about."""
    found = _signals(model, processor, book, signal)
    low, high = float(found.min()) / 4, float(found.max()) * 4
    for _ in range(40):  # the mean number falls as the divisor grows
        middle = (low + high) / 2
        if counts(found, keep, power, middle).float().mean() > keep:
            low = middle
        else:
            high = middle
    return ByImage(SeededFarthestPoint(book), keep, signal, power, high)


@cache
def _signals(model: Any, processor: Any, book: Codebook, signal: str) -> Tensor:
    family = models.family(model)
    pictures = [sample.pictures()[0] for sample in of_miniature("train", 99, 200, ["exist"])]
    with torch.inference_mode():
        pixels = torch.cat([family.view(processor, picture) for picture in pictures])
        features = family.image_features(model, pixels)[0]
    return torch.stack([SIGNALS[signal](own.float(), book) for own in features])


def books(model: Any, processor: Any, folder: Path, names: list[str]) -> dict[str, Codebook]:
    """Codebooks of `BOOKS`, from the scenes of the one that ships; what is in `folder` is not built again."""
    made = partial(_built, model, processor, folder)
    wanted = {
        "no isolation": lambda: made("no isolation", max_cluster_size=10**6),
        "no recurrence": lambda: made("shipped", min_image_fraction=0.0),
        "neither": lambda: made("no isolation", max_cluster_size=10**6, min_image_fraction=0.0),
        "count too": lambda: _under_all(made, ["count"]),
        "count and read too": lambda: _under_all(made, ["count", "read"]),
    }
    return {name: wanted[name]() for name in names}


def _built(model: Any, processor: Any, folder: Path, name: str, **changes: Any) -> Codebook:
    pool = _pool(model, processor, folder, name, **changes)
    return Codebook(pool.features[pool.recurring(preset("miniature", **changes))[0]])


def _pool(model: Any, processor: Any, folder: Path, name: str, **changes: Any) -> SurvivorPool:
    out = folder / name.replace(" ", "-")
    if not (out / "config.json").exists():
        scenes = folder / "scenes"
        if not scenes.exists():
            miniature.write_images(scenes, IMAGES)
        settings = preset("miniature", **changes | {"min_image_fraction": 0.0})
        with progress(f"build {name}", IMAGES, "images") as tick:
            build(model, processor, scenes, out, model_id="miniature", settings=settings,
                  progress=lambda state: tick(state.done))  # fmt: skip
    return SurvivorPool.load(out)[1]


def _under_all(made: partial, questions: list[str]) -> Codebook:
    """Survivors whose divergence is below the threshold under other questions too; P1 is that of the first.

    Too few to recur: what they compare with is the codebook without recurrence.
    """
    pool = _pool(*made.args, "shipped")
    where = [{_place(row) for row in _pool(*made.args, q, prompt=QUESTIONS[q], tau_p=1.0).rows} for q in questions]
    return Codebook(pool.features[[i for i, row in enumerate(pool.rows) if all(_place(row) in own for own in where)]])


def _place(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["image"], row["row"], row["col"]
