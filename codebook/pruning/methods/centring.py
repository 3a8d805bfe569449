"""The centred gate of Cen-Prune: what a token has beyond the image's mean, and how distinct it is."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from codebook.pruning.methods.base import unit_range


def centred(features: Tensor) -> Tensor:
    """(n, d) float32, of length 1: directions of one image's tokens (n, d) less their mean."""
    features = features.float()
    return normalize(features - features.mean(0), dim=-1)


def centred_gate(features: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of the tokens less their mean, and the gate that each token's distances count times.

    What all tokens of an image share makes their cosine similarities high and alike. Less the mean they spread, but
    then also the tokens near the mean point anywhere, by chance. The gate holds these back: it is the negative mean
    cosine similarity, without centring, of a token to all others, scaled to [0, 1] in the image.

    Parameters
    ----------
    features : (n, d) float
        Projector outputs of one image. In Qwen2.5-VL the authors take what enters the merger.

    Returns
    -------
    directions : (n, d) float32, of length 1
    gate : (n,) float32
    """
    unit = normalize(features.float(), dim=-1)
    # A token's similarity to itself is 1 for all, and so is the number of others: scaling takes both away.
    return centred(features), unit_range(-(unit @ unit.sum(0)))
