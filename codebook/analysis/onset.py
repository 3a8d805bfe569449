"""The onset: the first layer whose text attention knows which part of the image the question is about.

It is the twin of the information horizon. Before it, what text attends to says little about the question, and a choice
by it is worse than none; behind the horizon there is nothing left to choose. From notes on DeFT (arXiv 2609.34861),
which describes the diagnostic; how the layer is read off the curve is said here, in `onsets`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from codebook import models
from codebook.analysis.horizon import LEVEL, RESAMPLES, resampled
from codebook.analysis.layer_sweep import check_tasks
from codebook.analysis.prefill import Prefill
from codebook.analysis.telling import telling_prefill, telling_tokens
from codebook.errors import CodebookError
from codebook.inference.prompts import check_samples, prepare_samples
from codebook.inference.records import damaged, read_record
from codebook.inference.samples import Sample, samples_digest
from codebook.inference.uncertainty import UNKNOWN, deviation, error_of_mean
from codebook.models import Image
from codebook.models.base import Model, Processor, decoder
from codebook.models.finite import check_logits
from codebook.pruning.attention import Attention
from codebook.pruning.engine.tap import tap
from codebook.store.journal import Journal

REGIONS = (2, 4)
"""Rows and columns of regions that a wide or square image is cut into; of a high one they change places."""

TEST = 0.05
"""Level of the one-sided test that a curve rises at all, over all layers together."""

SINGLE_IMAGES = "the onset needs samples of one image each: leave out those of several, and videos"

Correlation = Annotated[float, Field(ge=-1.0001, le=1.0001)]


class Agreement(TypedDict):
    """Per layer the rank correlations of a sample in the journal, with its own question and with a swapped one."""

    own: list[Correlation]
    swapped: list[Correlation]


AGREEMENT_RECORD = TypeAdapter(Agreement)


@dataclass(frozen=True)
class Onset:
    """The onset of one task, or of the mean over tasks.

    Attributes
    ----------
    samples : int
        Number of samples.
    own, swapped : list[float]
        Per layer the mean rank correlation of the attention that regions get from the text with what the answer loses
        without them, under the question itself and under another one.
    error : list[float | None]
        Standard error of their difference; None where a task has a single image.
    layer : int or None
        First layer whose difference is at least half of the largest; None if nothing is known. A stage that asks the
        layer before it asks this one at `layer` + 1.
    interval : (int, int) or None
        Interval of `layer`, by the bootstrap over images.
    unknown : str or None
        Why nothing is known.
    """

    samples: int
    own: list[float]
    swapped: list[float]
    error: list[float | None]
    layer: int | None
    interval: tuple[int, int] | None
    unknown: str | None = None

    @property
    def difference(self) -> list[float]:
        """Per layer `own` minus `swapped`: what the attention knows of the question and not of the image alone."""
        return [a - b for a, b in zip(self.own, self.swapped, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's correlation along the last dimension, equal values sharing the mean of their ranks.

    Parameters
    ----------
    x, y : (..., n) float
        They broadcast to each other.

    Returns
    -------
    (...) float64; 0 where all values of one are equal
    """
    ranks = [(v[..., :, None] > v[..., None, :]).double().add(v[..., :, None] == v[..., None, :], alpha=0.5).sum(-1)
             for v in (x, y)]  # fmt: skip
    a, b = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-9)


def regions(image: Image) -> Tensor:
    """(8, n) bool: which of the visual tokens of an image of one grid lie in each of eight regions.

    Raises
    ------
    CodebookError
        If the image has crops or frames, or too few tokens.
    """
    grids = image.layout.grids
    down, across = REGIONS if grids[0].cols >= grids[0].rows else REGIONS[::-1]
    if len(grids) > 1 or grids[0].rows < down or grids[0].cols < across:
        raise CodebookError(f"the onset needs images of one grid of {down} x {across} tokens or more, not {image!r}")
    place = torch.arange(grids[0].count)
    row, col = place // grids[0].cols, place % grids[0].cols
    own = row * down // grids[0].rows * across + col * across // grids[0].cols
    return own == torch.arange(down * across)[:, None]


def agreements(
    model: Model,
    processor: Processor,
    samples: Sequence[Sample],
    file: Path | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> list[Agreement]:
    """Per sample and layer, how well text attention agrees with which parts of the image the answer needs.

    What a region is worth is h = NLL(answer without it) - NLL(answer), of the answer's first telling token
    (`telling_tokens`). What it gets is the attention from all tokens of the text after the image, averaged over heads
    and added up. Both are ranked over eight regions, under the sample's own question and under the next one of the list
    that differs.

    Parameters
    ----------
    samples
        Samples of one image each; where one has no answer, the unpruned model's own stands for it.
    file
        Journal of the finished samples: called again, it goes on.
    done
        Called with the number of samples done so far.

    Raises
    ------
    CodebookError
        If all questions are the same, an image has more than one grid, or the model is not supported.
    """
    model = models.unwrap(model)
    if len({sample.question for sample in samples}) < 2:
        raise CodebookError("the onset compares questions: give two different ones at least")
    if any(len(sample.images) != 1 for sample in samples):
        raise CodebookError(SINGLE_IMAGES)
    check_samples(model, processor, samples)
    about = models.identities(model, processor) | {"data": samples_digest(samples), "kind": "onset"}
    with Journal(file, about) as journal:
        telling = telling_tokens(processor, samples)
        for i, sample in enumerate(samples):
            if str(i) not in journal:
                later = (samples[(i + step) % len(samples)].question for step in range(1, len(samples)))
                other = next(question for question in later if question != sample.question)
                journal.add(str(i), _agreement(model, processor, sample, telling[i], other))
            done(i + 1)
        records = [read_record(journal, str(i), AGREEMENT_RECORD) for i in range(len(samples))]
        if any(len(own) != models.shape(model).layers for record in records for own in record.values()):  # type: ignore[arg-type]
            raise damaged(journal)
    return records


def _agreement(
    model: Model, processor: Processor, sample: Sample, telling: Sequence[int], other: str
) -> dict[str, list[float]]:
    with _overheard(model) as heard:
        prefill, target, given, _ = telling_prefill(model, processor, sample, telling)
    if len(prefill.images) != 1:
        raise CodebookError(SINGLE_IMAGES)
    parts = regions(prefill.images[0]).to(prefill.visual.device)
    logits = torch.cat([prefill.logits[None], prefill.answers([0] * len(parts), ~parts)])
    check_logits(logits)
    whole, *without = -logits.log_softmax(-1)[:, target]
    worth = torch.stack(without) - whole
    own = _text_attention(prefill, heard, given) @ parts.T.float()
    with _overheard(model) as heard:
        swapped = Prefill.of(model, prepare_samples(model, processor, [Sample(sample.images, other)]).inputs)
    others = _text_attention(swapped, heard, 0) @ parts.T.float()
    return {
        name: [round(value, 7) for value in rank_correlation(attention, worth).tolist()]
        for name, attention in (("own", own), ("swapped", others))
    }


@contextlib.contextmanager
def _overheard(model: Model) -> Iterator[dict[int, tuple[Tensor, Tensor, float]]]:
    """A context that gives, by number of the decoder layer, queries, keys and scaling of the last forward inside."""
    heard: dict[int, tuple[Tensor, Tensor, float]] = {}

    def hear(i: int, query: Tensor, key: Tensor, scaling: float) -> None:
        heard[i] = query, key, scaling

    with contextlib.ExitStack() as undo:
        for i, layer in enumerate(decoder(model).layers):
            if not models.is_recurrent(layer):  # `Prefill` refuses such a model, and says why
                undo.callback(tap(layer.self_attn, partial(hear, i)))
        yield heard


def _text_attention(prefill: Prefill, heard: Mapping[int, tuple[Tensor, Tensor, float]], given: int) -> Tensor:
    """(layers, n) float32: what the image's tokens get from the text after them, less the last `given` tokens."""
    length, rows = prefill.hidden[0].shape[1] - given, []
    question = torch.arange(int(prefill.visual.max()) + 1, length, device=prefill.visual.device)
    for i in range(prefill.layers):
        query, key, scaling = heard[i]
        cos, sin = (x[0] for x in models.family(prefill.model).rotary(prefill.given[i]["position_embeddings"]))
        rows.append(Attention(query[0], key[0], cos, sin, scaling, prefill.visual).rows(question).sum(0))
    return torch.stack(rows)


def onsets(
    tasks: Sequence[str], found: Sequence[Agreement], *, images: Sequence[int] | None = None, seed: int = 0
) -> dict[str, Onset]:
    """The onset of each task and, as `mean`, of the mean over tasks where there are several.

    It is the first layer whose difference of the two correlations is at least half of the largest. Nothing is known
    where the largest is not above 0 beyond chance: one-sided, at 5% over all layers together (Bonferroni).

    Parameters
    ----------
    tasks
        Task of each sample.
    found
        What `agreements` gives for them.
    images
        Number of the image of each sample: those about one are no independent draws. None: each has its own.
    seed
        Seed of the bootstrap.
    """
    named = np.array(tasks)
    own, swapped = (np.array([record[kind] for record in found]) for kind in ("own", "swapped"))  # type: ignore[literal-required]
    rng = np.random.default_rng(seed)
    by_task = {task: np.flatnonzero(named == task) for task in sorted(set(tasks))}
    check_tasks(by_task)
    shown = np.arange(len(tasks)) if images is None else np.asarray(images)
    gaps = [((own - swapped)[rows], shown[rows]) for rows in by_task.values()]
    drawn, apart = resampled(gaps, rng, RESAMPLES), [deviation(*gap) for gap in gaps]
    curves = {
        task: (own[rows].mean(0), swapped[rows].mean(0), one.error, draws, len(rows))
        for (task, rows), draws, one in zip(by_task.items(), drawn, apart, strict=True)
    }
    if len(curves) > 1:
        owns, swaps, *_ = zip(*curves.values(), strict=True)
        curves["mean"] = np.mean(owns, 0), np.mean(swaps, 0), error_of_mean(apart), np.mean(drawn, 0), len(tasks)
    return {task: _onset(*curve) for task, curve in curves.items()}


def _onset(own: np.ndarray, swapped: np.ndarray, error: np.ndarray, drawn: np.ndarray, samples: int) -> Onset:
    gap, layers = own - swapped, len(own)
    errors = [value if np.isfinite(value) else None for value in error.tolist()]
    top = int(gap.argmax())
    layer = interval = unknown = None
    if not np.isfinite(error).all():
        unknown = f"one {'sample' if samples == 1 else 'image'} shows no spread: ask more questions"
    elif gap[top] <= NormalDist().inv_cdf(1 - TEST / layers) * error[top]:
        unknown = "the attention agrees no better with a question of its own than with another one: ask more questions"
    else:
        tail = (1 - LEVEL) / 2
        ends = np.quantile(_half_risen(drawn), [tail, 1 - tail], method="nearest")
        layer, interval = int(_half_risen(gap)), (int(ends[0]), int(ends[1]))
    return Onset(samples, own.tolist(), swapped.tolist(), errors, layer, interval, unknown)


def _half_risen(gap: np.ndarray) -> np.ndarray:
    """First layer whose value is at least half of the largest: gap (..., L) -> (...) int64."""
    return (gap >= gap.max(-1, keepdims=True) / 2).argmax(-1)


def onset_table(found: Mapping[str, Onset]) -> str:
    """The onsets as plain text, and from which layer on a stage can choose by the text's attention."""
    lines = [f"{'task':<12}{'samples':>8}{'own':>8}{'swapped':>9}{'onset':>9}{'interval':>10}"]
    notes = []
    for task, one in found.items():
        top = int(np.argmax(one.difference))
        cells = (UNKNOWN, UNKNOWN) if one.interval is None else (str(one.layer), "-".join(map(str, one.interval)))
        row = f"{task:<12}{one.samples:>8}{one.own[top]:>8.2f}{one.swapped[top]:>9.2f}"
        lines.append(f"{row}{cells[0]:>9}{cells[1]:>10}")
        if one.unknown:
            notes.append(f"{task}: nothing is known: {one.unknown}")
    whole = found.get("mean", next(iter(found.values())))
    if whole.layer is None:
        last = "no layer is known at which text guides the choice"
    else:
        last = f"text guides the choice from layer {whole.layer} on: fastv(query='question')@{whole.layer + 1} asks it"
    return "\n".join([*lines, *notes, last])
