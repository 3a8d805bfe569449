"""A close look at one answer: which stage dropped each token, who stands for whom, and the scores they were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image as Picture
from torch import Tensor

from codebook.inference.ask import Answer, ask
from codebook.models import Image
from codebook.models.base import Model, Processor
from codebook.pruning import Schedule
from codebook.pruning.methods.base import FramePruner, Pruner, ScoringPruner, nearest_kept
from codebook.pruning.stage import Stage
from codebook.pruning.tokens import VisualTokens


@dataclass(frozen=True)
class CloseLook:
    """What the stages of a schedule did to the whole view of a picture; tokens are raster positions in its `grid`.

    Attributes
    ----------
    stages
        The tokens left after each stage.
    stands
        For each dropped token that is stood for the kept token that stands for it (`+mass`).
    scores
        What the first stage whose method ranks tokens scored each; empty if none does.
    """

    answer: Answer
    grid: tuple[int, int]
    stages: list[list[int]]
    stands: dict[int, int]
    scores: dict[int, float]


def look_closely(
    model: Model,
    processor: Processor,
    picture: Picture.Image,
    question: str,
    schedule: Schedule,
    max_new_tokens: int = 32,
) -> CloseLook:
    """Ask about one picture as `ask` does, and note what every stage saw."""
    watched = [(_WatchedFrames if stage.joint else _Watched)(stage) for stage in schedule.stages]
    own = replace(
        schedule, stages=[replace(stage, pruner=w) for stage, w in zip(schedule.stages, watched, strict=True)]
    )
    [answer] = ask(model, processor, [[picture]], [question], own, max_new_tokens)
    [image], [kept] = answer.images, answer.stages
    left = [image.view(tokens)[0] for tokens in kept]
    stands: dict[int, int] = {}
    scores: dict[int, float] = {}
    for stage, seen, now in zip(schedule.stages, watched, left, strict=True):
        note = _of_view(image, seen.notes)
        stands |= {} if note is None else note.nearest
        # Whoever stood for a token and is dropped now passes it on, or, in a stage without mass, forgets it.
        stands = {token: stands.get(to, to) for token, to in stands.items()}
        stands = {token: to for token, to in stands.items() if stage.mass or to in now}
        scores = scores or ({} if note is None else note.scores)
    return CloseLook(answer, image.view([])[1], left, stands, scores)


@dataclass(frozen=True)
class _Note:
    nearest: dict[int, int]
    scores: dict[int, float]


class _Watched(Pruner):
    """The pruner of a stage, which notes what it was asked and what it chose."""

    def __init__(self, stage: Stage) -> None:
        self.pruner, self.mass, self.notes = stage.pruner, stage.mass, list[_Note]()
        for name in ("uses_attention", "uses_vision", "uses_text", "uses_change", "before_llm", "joint", "adaptive"):
            setattr(self, name, getattr(stage.pruner, name))

    @property
    def own_layer(self) -> bool:
        return self.pruner.own_layer

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        return self._noted(tokens, self.pruner.select(tokens, keep))

    def choose(self, tokens: VisualTokens) -> Tensor:
        return self._noted(tokens, self.pruner.choose(tokens))

    def merge(self, tokens: VisualTokens, index: Tensor) -> Tensor | None:
        return self.pruner.merge(tokens, index)

    def groups(self, tokens: VisualTokens, index: Tensor) -> Tensor | None:
        return self.pruner.groups(tokens, index)

    def _noted(self, tokens: VisualTokens, index: Tensor) -> Tensor:
        places, nearest, scores = tokens.ordinal.tolist(), {}, {}
        if self.mass:
            groups = self.groups(tokens, index)
            owner = tokens.ordinal[index][nearest_kept(tokens.hidden, index) if groups is None else groups].tolist()
            nearest = {token: to for token, to in zip(places, owner, strict=True) if token != to}
        if isinstance(self.pruner, ScoringPruner):
            scores = dict(zip(places, self.pruner.score(tokens).float().tolist(), strict=True))
        self.notes.append(_Note(nearest, scores))
        return index


class _WatchedFrames(_Watched, FramePruner):
    """The same of a pruner that chooses among frames."""

    def select_frames(self, frames: Sequence[VisualTokens], keep: int) -> list[Tensor]:
        assert isinstance(self.pruner, FramePruner)
        chosen = self.pruner.select_frames(frames, keep)
        return [self._noted(tokens, index) for tokens, index in zip(frames, chosen, strict=True)]


def _of_view(image: Image, notes: Sequence[_Note]) -> _Note | None:
    """The note about the image's whole view; None where that was not asked about, or shares its quota with crops."""
    return notes[image.layout.whole] if len(notes) == len(image.layout.grids) else None
