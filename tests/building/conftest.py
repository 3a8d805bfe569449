"""A tiny random LLaVA with a processor, and pictures to build from."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.building.tiny import model, processor


@pytest.fixture(scope="session")
def tiny():
    """(model, processor) with 36 visual tokens an image; random weights, nothing downloaded."""
    return model(), processor()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Eight random pictures, two of them in a subfolder."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub").mkdir()
    random = np.random.default_rng(0)
    for i in range(8):
        coarse = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        path = folder / ("sub" if i % 4 == 0 else "") / f"{i}.{'jpg' if i % 2 else 'png'}"
        Image.fromarray(coarse).resize((24, 24)).save(path)
    return folder
