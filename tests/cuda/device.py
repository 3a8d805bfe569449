"""The device of these tests: a GPU; with CODEBOOK_TEST_DEVICE=cpu the CPU, which finds mistakes of the tests alone."""

import os

import pytest
import torch

DEVICE = os.environ.get("CODEBOOK_TEST_DEVICE", "cuda")
CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"),
]


def moved(inputs, dtype=None, device=DEVICE):
    """A model's inputs on the device, pixels in `dtype`."""
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}
