"""Spread of an image's tokens: by it a schedule may give each image a budget of its own."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity


def spread(features: Tensor) -> Tensor:
    """The standard deviation of the tokens' cosine similarities to their mean.

    A plain image is mostly like its mean, and its few objects are not; in a crowded one similarities are all over.

    Parameters
    ----------
    features : (n, d) float
        Projector outputs of one image, n at least 1.

    Returns
    -------
    () float32
    """
    features = features.float()
    return cosine_similarity(features, features.mean(0, keepdim=True), dim=-1).std(correction=0)
