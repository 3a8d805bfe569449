"""From one image to its redundant, isolated tokens: the cheapest condition first, the dearest on what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codebook.building.candidates import candidates
from codebook.building.clustering import dpc_knn
from codebook.building.presets import Settings
from codebook.building.probes import Prober
from codebook.models import Family


@dataclass(frozen=True)
class Survivors:
    """What one image yields.

    Attributes
    ----------
    features : (m, d) float32
        Raw projector outputs of its tokens that are redundant and isolated, in raster order.
    tokens
        For each of them `row`, `col`, `p1`, `jsd_region`, `jsd_global`.
    funnel
        How many of its tokens each step left.
    """

    features: Tensor
    tokens: list[dict[str, Any]]
    funnel: dict[str, int]


@torch.inference_mode()
def survivors(pixels: Tensor, model: Any, family: Family, prober: Prober, settings: Settings) -> Survivors:
    """Probe one image, `pixels` (1, 3, H, W) (section 3.2).

    The conditions are joined by AND and the divergences are never negative, so each is computed only where the ones
    before hold; the result is the same as of computing all. Isolation is among all probed tokens, redundant or not.
    """
    projected, patches, cls = family.image_features(model, pixels.to(model.device, model.dtype))
    tokens = projected[0]
    probed = candidates(settings.candidates, prober.grid, patches[0], None if cls is None else cls[0])

    features = tokens[probed.to(tokens.device)]
    own = model.config.get_text_config().hidden_size  # after that, what deeper layers add
    confidence = prober.alone(features).tolist()
    left = [i for i in range(len(probed)) if confidence[i] < settings.tau_p]
    funnel = {"probed": len(probed), "P1": len(left)}

    near: dict[int, float] = {}
    far: dict[int, float] = {}
    if left:
        near = dict(zip(left, prober.in_region(tokens, probed[left].tolist(), settings.jsd).tolist(), strict=True))
        left = [i for i in left if near[i] < settings.tau_j]
    if left:
        far = dict(zip(left, prober.in_image(tokens, probed[left].tolist(), settings.jsd).tolist(), strict=True))
        left = [i for i in left if near[i] + settings.global_weight * far[i] < settings.tau_j]
    funnel["JSD"] = len(left)

    raw = features[:, :own].float().cpu()
    if left:
        labels = dpc_knn(raw, settings.clusters_per_image, settings.neighbours, settings.seed)
        sizes = labels.bincount()[labels].tolist()
        left = [i for i in left if sizes[i] <= settings.max_cluster_size]
    funnel["isolated"] = len(left)

    cols = prober.grid[1]
    found = [
        {
            "row": int(probed[i]) // cols, "col": int(probed[i]) % cols,
            "p1": confidence[i], "jsd_region": near[i], "jsd_global": far[i],
        }
        for i in left
    ]  # fmt: skip
    return Survivors(raw[left], found, funnel)
