"""Fingerprints: short strings that identify a model's weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from codebook.models.base import Model
from codebook.models.registry import family

FINGERPRINT_SAMPLES = 32
"""Weights sampled from each of tower and projector."""


def fingerprint(model: Model) -> str:
    """A string that identifies tower and projector: their sizes and sampled weights, in whatever dtype they are loaded.

    Returns
    -------
    `family:SIZE-WEIGHTS:SIZE-WEIGHTS`, tower first: the number of parameters, and the middle weight of up to 32
    matrices, each as the four hexadecimal digits of its bfloat16
    """
    kind = family(model)
    parts = []
    for module in (kind.tower(model), kind.projector(model)):
        weights = [p for p in module.parameters() if p.dim() > 1]
        step = max(1, len(weights) // FINGERPRINT_SAMPLES)
        chosen = weights[::step][:FINGERPRINT_SAMPLES]
        sample = torch.stack([w.detach().flatten()[w.numel() // 2].float() for w in chosen])
        hexed = sample.cpu().to(torch.bfloat16).view(torch.int16).numpy().astype(">i2").tobytes().hex()
        parts.append(f"{sum(p.numel() for p in module.parameters())}-{hexed}")
    return ":".join([kind.name, *parts])


def same_fingerprint(a: str, b: str) -> bool:
    """Whether two fingerprints are of the same weights, up to the rounding of half-precision types."""
    parts_a, parts_b = a.split(":"), b.split(":")
    if len(parts_a) != len(parts_b) or parts_a[0] != parts_b[0]:
        return False
    for part_a, part_b in zip(parts_a[1:], parts_b[1:], strict=True):
        (size_a, hex_a), (size_b, hex_b) = part_a.split("-"), part_b.split("-")
        if size_a != size_b or len(hex_a) != len(hex_b):
            return False
        if not torch.allclose(_weights(hex_a), _weights(hex_b), rtol=2**-6, atol=1e-6):
            return False
    return True


def identity(model: Model) -> str:
    """A string that identifies all of a model's weights: its fingerprint, and a hash of one weight per parameter of
    the decoder."""
    sampled = [p.detach().flatten()[p.numel() // 2].float() for p in model.get_decoder().parameters()]
    decoder = hashlib.sha256(torch.stack(sampled).cpu().numpy().tobytes()).hexdigest()[:16]
    return f"{fingerprint(model)}:{decoder}"


def _weights(text: str) -> Tensor:
    """The weights in a fingerprint's hexadecimal digits, float32."""
    bits = [int(text[i : i + 4], 16) for i in range(0, len(text), 4)]
    signed = [b - 65536 if b >= 32768 else b for b in bits]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).float()
