"""What RESTORE (arXiv 2606.01711) gives back of the attention that rotary embeddings take from a token far away."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines (..., P, d) of the positions of P tokens."""


def distance_bias(query: Rotary, key: Rotary) -> Tensor:
    """log(2 - D(|m - n|)) for queries at positions m and keys at positions n: 0 at a query's own, at most log 3.

    With theta_j the frequencies of d / 2 pairs of numbers, D(t) = (2 / d) sum_j cos(t theta_j). As cos(m theta) cos(n
    theta) + sin(m theta) sin(n theta) = cos((m - n) theta), it is the cosine similarity of what the rotary embeddings
    say of the two positions. So it is that of the very layer, whatever its frequencies and scaling; where positions
    have several axes, each frequency has the distance along its own.

    Parameters
    ----------
    query, key
        Rotary embeddings of Q and K positions.

    Returns
    -------
    (..., Q, K) float32
    """
    q, k = (normalize(torch.cat(pair, dim=-1).float(), dim=-1) for pair in (query, key))
    with torch.autocast(q.device.type, enabled=False):  # whose products would be in half precision
        return (2 - q @ k.transpose(-1, -2)).log()
