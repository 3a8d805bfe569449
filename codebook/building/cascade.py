"""From one image to its redundant, isolated tokens: cheapest condition first, the most expensive on what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from codebook.building.candidates import candidates
from codebook.building.clustering import dpc_knn
from codebook.building.presets import Settings
from codebook.building.probes import Prober
from codebook.models import Family, Model
from codebook.models.finite import check_logits
from codebook.store.folder import TokenRecord
from codebook.store.spread import spread

ProbeName = Literal["p1", "jsd_region", "jsd_global"]
"""Name of a probe's value in a token's record."""
PROBE_NAMES: tuple[ProbeName, ...] = get_args(ProbeName)
MARGIN = 0.002
"""Relative distance to a threshold within which a value is computed again, in a forward pass of its own."""


@dataclass(frozen=True)
class Survivors:
    """What one image yields.

    Attributes
    ----------
    features : (m, d) float32
        Raw projector outputs of the image's tokens that are redundant and isolated, in raster order.
    tokens
        For each of them `row`, `col`, `p1`, `jsd_region`, `jsd_global`.
    funnel
        Numbers of the image's tokens that each step left.
    spread
        Spread of all the image's tokens (`codebook.store.spread`), to six decimals.
    probes
        In an exhaustive run, for each probed token what `tokens` says, and `cluster_size`; else empty.
    """

    features: Tensor
    tokens: list[dict[str, Any]]
    funnel: dict[str, int]
    spread: float
    probes: list[dict[str, Any]]


class _Probes:
    """What the probes say of one image's tokens.

    Attributes
    ----------
    values
        For each token the probes' values by their names, of those that were asked.
    """

    def __init__(self, prober: Prober, tokens: Tensor, settings: Settings, values: dict[int, dict[str, float]]) -> None:
        self.values = values
        self._prober, self._tokens, self._jsd = prober, tokens, settings.jsd

    def measure(self, name: ProbeName, asked: Sequence[int]) -> None:
        """Ask a probe about the tokens whose value is not known yet."""
        if new := [token for token in asked if name not in self.values[token]]:
            for token, value in zip(new, self._ask(self._prober, name, new).tolist(), strict=True):
                self.values[token][name] = value

    def again(self, token: int, *names: ProbeName) -> None:
        """Ask probes about one token in forward passes of its own."""
        alone = self._prober.one_by_one()
        self.values[token] |= {name: self._ask(alone, name, [token]).item() for name in names}

    def _ask(self, prober: Prober, name: ProbeName, asked: list[int]) -> Tensor:
        if name == "p1":
            return prober.alone(self._tokens[asked])
        in_context = prober.in_region if name == "jsd_region" else prober.in_image
        return in_context(self._tokens, asked, self._jsd)


@torch.inference_mode()
def survivors(
    pixels: Tensor, model: Model, family: Family, prober: Prober, settings: Settings, exhaustive: bool = False,
    known: Sequence[TokenRecord] = (),
) -> Survivors:  # fmt: skip
    """Probe one image, `pixels` (1, 3, H, W) (https://arxiv.org/abs/2503.20540, section 3.2).

    The conditions are joined by AND, so each is tested only where the ones before hold, from the cheapest to the most
    expensive: isolation, which needs no LLM and is among all probed tokens, redundant or not; then P1; then the two
    divergences, the first of which drops a token alone if it exceeds the threshold, since neither is negative.

    Batches differ in the last bits of their values. A value within `MARGIN` of its threshold is therefore computed
    again in a forward pass of its own, so that in float32 no batch size changes which tokens are found.

    Parameters
    ----------
    settings
        A threshold that is None is no condition.
    exhaustive
        Run every probe on every probed token; the survivors are the same.
    known
        What an exhaustive run said of the image's tokens: those probes are not run again.
    """
    projected, patches, cls = family.image_features(model, pixels.to(model.device, model.dtype))
    tokens = projected[0]
    chosen = candidates(settings.candidates, prober.grid, patches[0], None if cls is None else cls[0])
    probed, cols = chosen.tolist(), prober.grid[1]
    tau_p, tau_j = (math.inf if tau is None else tau for tau in (settings.tau_p, settings.tau_j))
    own = model.config.get_text_config().hidden_size  # after that, what deeper layers add
    raw = tokens[chosen.to(tokens.device), :own].float().cpu()

    probes = _Probes(prober, tokens, settings, {token: {} for token in probed})
    for row in known:
        if (token := row["row"] * cols + row["col"]) in probes.values:
            probes.values[token] = {name: row[name] for name in PROBE_NAMES}
    values = probes.values

    def jsd(token: int) -> float:
        return divergence(values[token], settings.global_weight)

    check_logits(raw.abs())  # NaN has no nearest neighbour, and no cluster
    labels = dpc_knn(raw, settings.clusters_per_image, settings.neighbours, settings.seed)
    sizes = dict(zip(probed, labels.bincount()[labels].tolist(), strict=True))
    left = [token for token in probed if sizes[token] <= settings.max_cluster_size]
    funnel = {"probed": len(probed), "isolated": len(left)}

    probes.measure("p1", probed if exhaustive else left)
    for token in left:
        if _close(values[token]["p1"], tau_p):
            probes.again(token, "p1")
    left = [token for token in left if values[token]["p1"] < tau_p]
    funnel["P1"] = len(left)

    probes.measure("jsd_region", probed if exhaustive else left)
    left = [token for token in left if values[token]["jsd_region"] < tau_j * (1 + MARGIN)]
    probes.measure("jsd_global", probed if exhaustive else left)
    for token in left:
        if _close(jsd(token), tau_j):
            probes.again(token, "jsd_region", "jsd_global")
    left = [token for token in left if jsd(token) < tau_j]
    funnel["JSD"] = len(left)

    def rows(asked: list[int]) -> list[dict[str, Any]]:
        return [{"row": token // cols, "col": token % cols, **values[token]} for token in asked]

    sized = [{**row, "cluster_size": sizes[token]} for token, row in zip(probed, rows(probed), strict=True)]
    kept = set(left)
    found = raw[[i for i, token in enumerate(probed) if token in kept]]
    return Survivors(found, rows(left), funnel, round(float(spread(tokens[:, :own])), 6), sized if exhaustive else [])


def divergence(token: Mapping[str, Any], global_weight: float) -> float:
    """What `tau_j` bounds: how much the answer changes without the token, in its region and in the image."""
    return token["jsd_region"] + global_weight * token["jsd_global"]


def _close(value: float, threshold: float) -> bool:
    return math.isfinite(threshold) and abs(value - threshold) <= MARGIN * threshold
