"""Token information: how much a single visual token, from some layer on, tells the model about the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codebook.analysis.prefill import VARIANTS_PER_FORWARD, Cost, Prefill
from codebook.errors import CodebookError
from codebook.models import Image
from codebook.models.base import Model
from codebook.models.finite import check_logits


@dataclass(frozen=True)
class Information:
    """Token information of one sample, in probability.

    Attributes
    ----------
    layers
        The layers that it was measured at.
    windows
        The visual tokens of each window, counted over all images of the prompt in raster order.
    values : (layers, windows) float32
        Probability of the answer's first token with only that window from the layer on, minus that with no visual
        token. With `leave_one_out`: that with all visual tokens minus that with all but the window.
    none : (layers,) float32
        Probability with no visual token from the layer on.
    full : float
        Probability of the unpruned model.
    target : int
        Id of the answer's first token.
    cost : Cost
        Work of the prefill and its continuations.
    """

    layers: list[int]
    windows: list[list[int]]
    values: Tensor
    none: Tensor
    full: float
    target: int
    cost: Cost

    @property
    def mean(self) -> Tensor:
        """(layers,) float32: mean over the windows. Beyond the information horizon it vanishes, as does `variance`."""
        return self.values.mean(1)

    @property
    def variance(self) -> Tensor:
        """(layers,) float32: variance over the windows."""
        return self.values.var(1, correction=0)


def token_information(
    model: Model,
    inputs: Any,
    layers: Sequence[int] | None = None,
    *,
    window: int = 1,
    target: int | None = None,
    leave_one_out: bool = False,
    batch_size: int = VARIANTS_PER_FORWARD,
) -> Information:
    """Information of every visual token, or window of them, of one sample (arXiv 2512.07580, I_l).

    Parameters
    ----------
    model
        A stock model, in eval mode.
    inputs
        The processor's output for one sample, without padding.
    layers
        Layers whose inputs lose the tokens; 0 is before the LLM. Default: every layer.
    window
        Side of the square windows that an image's grids are cut into; those at right and lower edges may be smaller.
    target
        Id of the answer's first token (`codebook.inference.prompts.answer_ids`). None: the unpruned model's own.
    leave_one_out
        Remove one window instead of all others: p(all) - p(all but the window).
    batch_size
        Sequences per forward: more are faster and take more memory.

    Returns
    -------
    Information

    Raises
    ------
    CodebookError
        If the model, the inputs or a layer is not supported.
    """
    prefill = Prefill.of(model, inputs)
    layers = list(range(prefill.layers) if layers is None else layers)
    if not layers or min(layers) < 0 or max(layers) >= prefill.layers:
        raise CodebookError(f"choose layers from 0 to {prefill.layers - 1}, not {layers}")
    if window < 1:
        raise CodebookError(f"a window of {window} tokens a side is none: choose 1 or more")
    parts, n = windows(prefill.images, window), len(prefill.visual)
    alone = torch.zeros(len(parts) + 1, n, dtype=torch.bool, device=prefill.visual.device)
    for row, part in enumerate(parts, 1):
        alone[row, part] = True
    kept = torch.cat([alone[:1], ~alone[1:]]) if leave_one_out else alone
    variants = [layer for layer in layers for _ in kept]
    logits = prefill.answers(variants, kept.repeat(len(layers), 1), batch_size)
    check_logits(torch.cat([prefill.logits[None], logits]))
    own = int(prefill.logits.argmax()) if target is None else target
    p = logits.softmax(-1)[:, own].view(len(layers), -1)
    full = float(prefill.logits.softmax(-1)[own])
    values = full - p[:, 1:] if leave_one_out else p[:, 1:] - p[:, :1]
    return Information(layers, parts, values, p[:, 0], full, own, prefill.cost)


def windows(images: Sequence[Image], side: int) -> list[list[int]]:
    """The images' visual tokens in square windows of `side` x `side` tokens, windows in raster order."""
    found, before = [], 0
    for image in images:
        for grid in image.layout.grids:
            for top in range(0, grid.rows, side):
                for left in range(0, grid.cols, side):
                    rows, cols = range(top, min(top + side, grid.rows)), range(left, min(left + side, grid.cols))
                    found.append([before + r * grid.cols + c for r in rows for c in cols])
            before += grid.count
    return found
