"""What each place changes where our methods could depart from their authors' code: docs/pruning.md.

    python -m benchmarks.experiments.authors --out authors.sqlite --count 40

Held-out questions of the miniature, `--count` a family. Every line is a method with one thing done otherwise, paired
with the method as it is. Finished batches are kept in --out: the command can be stopped and run again.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook import Schedule, ask, load, models
from codebook.cli.data import load_data
from codebook.cli.output import progress
from codebook.errors import CodebookError
from codebook.evaluation.metrics import estimate, mean_of
from codebook.inference.respond import Policy, respond
from codebook.inference.samples import Sample
from codebook.inference.uncertainty import NORMAL_QUANTILE, plus_minus
from codebook.pruning import Dart, FastV, SparseVLM, Uniform, Union, VisionZip, VisualTokens
from codebook.pruning.methods.phi_knn import peakedness


class Plain(Dart):
    """DART on hidden states as they are."""

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        return super().select(replace(tokens, norm=lambda hidden: hidden), keep)


class CosineRaters(SparseVLM):
    """SparseVLM whose raters are the words most like the visual tokens at the stage's own layer."""

    def score(self, tokens: VisualTokens) -> Tensor:
        text = normalize(tokens.sequence[tokens.question].float(), dim=-1)
        likeness = text @ normalize(tokens.hidden.float(), dim=-1).mean(0)
        return (likeness >= likeness.mean()).float() @ tokens.attention.rows(tokens.question)


class FiveNeighbours(SparseVLM):
    """SparseVLM with five neighbours, and as many averages as the share of the dropped tokens gives, at most half."""

    def _parts(self, tokens: VisualTokens, keep: int) -> tuple[Tensor, Tensor]:
        n = len(tokens)
        order = self.score(tokens).argsort(descending=True, stable=True)
        own = keep - min(keep // 2, 1 + int(self.recycled * self.clusters * (n - keep)))
        return order[:own], order[own : own + max(keep - own, round(self.recycled * (n - own)))]

    @staticmethod
    def _peaks(hidden: Tensor, count: int) -> Tensor:
        tie = torch.arange(len(hidden), 0, -1).double() / len(hidden)
        return peakedness(hidden, 5, tie).topk(count).indices.sort().values


@dataclass(frozen=True)
class WithCls(VisionZip):
    """VisionZip that passes [CLS] on, in the place of the first token that is dropped, as one of the dominant.

    `seen` has, of the images that the tower saw last, the first patch and [CLS] after the projector: (B, 2, d).
    """

    seen: tuple[Tensor, ...] | list[Tensor] = ()

    def select(self, tokens: VisualTokens, keep: int) -> Tensor:
        return torch.cat([self._rest(tokens, keep), self._place(tokens, keep)]).sort().values

    def merge(self, tokens: VisualTokens, index: Tensor) -> Tensor:
        rest, place = self._rest(tokens, len(index)), self._place(tokens, len(index))
        values = tokens.hidden.clone()
        merged = self._patches(len(index)).merge(tokens, rest)
        if merged is not None:
            values[rest] = merged
        pairs = self.seen[-1]
        values[place] = pairs[(pairs[:, 0] - tokens.whole[0]).norm(dim=1).argmin(), 1]
        return values[index]

    def _patches(self, keep: int) -> VisionZip:
        return VisionZip(dominant=max(0, round(self.dominant * keep) - 1) / max(1, keep - 1))

    def _rest(self, tokens: VisualTokens, keep: int) -> Tensor:
        return self._patches(keep).select(tokens, keep - 1)

    def _place(self, tokens: VisualTokens, keep: int) -> Tensor:
        rest = self._rest(tokens, keep).tolist()
        return torch.tensor([next(i for i in range(len(tokens)) if i not in rest)])


def watch_cls(model: Any) -> list[Tensor]:
    """A list of one, which has what `WithCls` needs of the images that the tower saw last."""
    seen: list[Tensor] = []

    def take(_: Any, args: Any, output: Any) -> None:
        states = output.hidden_states[model.config.vision_feature_layer]
        seen[:] = [model.base_model.multi_modal_projector(states[:, :2]).flip(1)]

    model.base_model.vision_tower.register_forward_hook(take)
    return seen


NOROPE = FastV(rotated=False, image_only=True)
Change = Callable[[Schedule, list[Tensor]], Schedule]


def _kept(schedule: Schedule, seen: list[Tensor]) -> Schedule:
    return replace(schedule, positions="keep")


def _pruner(make: Callable[..., Any], schedule: Schedule, seen: list[Tensor]) -> Schedule:
    """The schedule with another pruner in each stage whose pruner `make` takes for its own."""
    return replace(schedule, stages=[replace(s, pruner=make(s.pruner, seen)) for s in schedule.stages])


def _instead(kind: type, *args: Any, **options: Any) -> Change:
    """Another pruner for those stages that have a pruner of the class that `kind` stands for."""
    return partial(_pruner, lambda own, seen: kind(*args, **options) if isinstance(own, kind.__mro__[1]) else own)


LINES: list[tuple[str, str, str | None, Change | None]] = [
    ("feather-ensemble@2", "grid from cells' centres", None,
     partial(_pruner, lambda own, seen: Union(Uniform(), NOROPE, own.share))),
    ("feather", "grid from cells' centres, and a third of the first stage", None,
     partial(_pruner, lambda own, seen: Union(Uniform(), NOROPE) if isinstance(own, Union) else own)),
    ("uniform", "from the corner", "uniform(phase='corner')", None),
    ("dart", "states not normalised", None, _instead(Plain)),
    ("sparsevlm", "position ids kept", "sparsevlm; positions=keep", None),
    ("sparsevlm", "stages at layers 2, 6, 15", "sparsevlm@1:0.5365, sparsevlm@2:0.3542, sparsevlm@6:0.1962; "
     "positions=compact", None),
    ("sparsevlm", "raters by cosine at the stage's layer", None, _instead(CosineRaters)),
    ("sparsevlm", "five neighbours, fewer averages", None, _instead(FiveNeighbours)),
    ("pyramiddrop", "position ids kept", "pyramiddrop; positions=keep", None),
    ("pyramiddrop", "ranked by the layer before", "fastv@3:0.5, fastv@6:0.25, fastv@9:0.125; positions=compact", None),
    ("visionzip", "[CLS] passed on", None, partial(_pruner, lambda own, seen: WithCls(seen=seen))),
    ("visionzip", "position ids renumbered", "visionzip; positions=compact", None),
    ("cdpruner", "relevance negated", "cdpruner(negated=True)", None),
]  # fmt: skip
"""Method, what is done otherwise, and how: a schedule's text, or a change of the method's schedule."""
METHODS = list(dict.fromkeys(method for method, *_ in LINES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="journal of the answers")
    parser.add_argument("--count", type=int, default=40, help="questions a family")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.11], help="0.5 where these are out of reach")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = parser.parse_args()
    model, processor = load("miniature")
    size, seen = models.shape(model), watch_cls(model)
    found: dict[str, Schedule] = {}
    pairs: list[tuple[str, str, float]] = []
    for method, otherwise, text, change in LINES:
        if method not in options.methods:
            continue
        for keep in _reached(partial(Schedule.solve, method, n=size.tokens, layers=size.layers), options.keep):
            fitted = partial(Schedule.solve, keep=keep, n=size.tokens, layers=size.layers)
            found[f"{method} {keep}"] = own = fitted(method)
            found[f"{method}, {otherwise} {keep}"] = fitted(text) if text else change(own, seen)
            pairs.append((method, otherwise, keep))
    plans: dict[str, Policy] = {name: partial(_always, schedule) for name, schedule in found.items()}
    tasks = load_data(["miniature"], options.count)
    samples = [sample for task in tasks for sample in task.samples]
    with progress("answer", len(plans) * len(samples), "answers") as tick:
        said = respond(model, processor, samples, plans, options.out, tick)
    values = {}
    for name, responses in said.items():
        rest = iter([one.text for one in responses])
        values[name] = [estimate(t.metric, t.sums([next(rest) for _ in t.samples])) for t in tasks]
    few = [sample for task in tasks for sample in task.samples[:1]]
    print(f"{len(samples)} questions; tokens in common: of those kept to the last layer, on {len(few)}\n")
    print("| method | keep | as it is | otherwise | change | in common |\n|---|---|---|---|---|---|")
    for method, otherwise, keep in pairs:
        names = f"{method} {keep}", f"{method}, {otherwise} {keep}"
        own, other = (values[name] for name in names)
        change, error = mean_of([b - a for a, b in zip(own, other, strict=True)])
        shared = common(model, processor, few, *(found[name] for name in names))
        print(f"| `{method}` | {keep} | {100 * mean_of(own)[0]:.1f} | {otherwise}: {100 * mean_of(other)[0]:.1f} | "
              f"{100 * change:+.1f} {plus_minus(100 * NORMAL_QUANTILE * (error or 0))} | {shared:.2f} |")  # fmt: skip


def common(model: Any, processor: Any, samples: list[Sample], *schedules: Schedule) -> float:
    """The share of the tokens that one schedule keeps to the last layer which the other keeps too, over all images."""
    kept = []
    for schedule in schedules:
        pictures, questions = [sample.pictures() for sample in samples], [sample.question for sample in samples]
        answers = ask(model, processor, pictures, questions, schedule, 1)
        kept.append([{*map(int, own)} for answer in answers for own in answer.kept])
    shares = [len(a & b) / len(a) for a, b in zip(*kept, strict=True)]
    return sum(shares) / len(shares)


def _reached(solve: Callable[..., Schedule], keeps: list[float]) -> list[float]:
    """The budgets that a method can meet, or 0.5."""
    able = []
    for keep in keeps:
        with contextlib.suppress(CodebookError):
            solve(keep=keep)
            able.append(keep)
    return able or [0.5]


def _always(schedule: Schedule, asked: object) -> Schedule:
    return schedule


if __name__ == "__main__":
    main()
