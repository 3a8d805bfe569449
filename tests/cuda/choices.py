"""A random image's tokens on any device, in any precision, and what each method chooses of them."""

import functools
import math
from dataclasses import replace

import torch

from codebook import Codebook, VisualTokens
from codebook.pruning import METHODS
from codebook.pruning.attention import Attention, Vision

NAMES = [name for name, method in METHODS.items() if name != "drop" and not method.joint]
"""Methods that choose among the tokens of one image; the others compare frames, or keep nothing."""

N, TEXT, WIDTH, HEADS, KEEP = 144, 9, 64, 4, 36


@functools.cache
def book():
    return Codebook(torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(1)))


def tokens(device, dtype=torch.float32, rounded=torch.float32):
    """A random image with text behind it. Its values were once in `rounded`; those of the attention stay in float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    sequence = draw(N + TEXT, WIDTH).to(rounded).to(dtype).to(device)
    side, span = math.isqrt(N), slice(0, N)
    query, key = (draw(HEADS, N + TEXT, WIDTH // HEADS).to(device) for _ in range(2))
    angles = draw(N + TEXT, WIDTH // HEADS).to(device)
    attention = Attention(query, key, angles.cos(), angles.sin(), 0.25, span)
    vision = Vision(draw(HEADS, N + 1, 16).to(device), draw(HEADS, N + 1, 16).to(device), 0.25, has_cls=True)
    pixels = draw(3, 2 * side, 2 * side).to(device)
    return VisualTokens(
        sequence[span], sequence[span], sequence, span, torch.arange(N, N + TEXT, device=device),
        torch.arange(N, device=device), (side, side), torch.tensor(7, device=device), attention, vision,
        whole=sequence[span], words=sequence[N:], norm=_norm, pixels=pixels, encode=lambda r, c: sequence[: r * c],
    )  # fmt: skip


def _norm(states):
    """A decoder's last normalisation, which computes in float32 and rounds to the type of its input."""
    return torch.nn.functional.rms_norm(states.float(), states.shape[-1:]).to(states.dtype)


def pruner(name):
    method = METHODS[name]
    made = method(book()) if method.needs_codebook else method()
    return replace(made, threshold=0.3) if made.adaptive else made


def choose(name, given):
    own = pruner(name)
    index = own.choose(given) if own.adaptive else own.select(given, KEEP)
    return index, own.merge(given, index)
