"""Timing is tested, not measured: two rounds of three tokens."""

import json

import pytest
from PIL import Image

from codebook.evaluation import costs, latency


@pytest.fixture(scope="package", autouse=True)
def hurry():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "DECODED_TOKENS", 2)
        patch.setattr(costs, "ROUNDS", (2, 2))
        yield


@pytest.fixture
def put(tmp_path):
    """Write a file below a folder: text, JSON, or a picture by its suffix."""

    def write(name, content=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (8, 8)).save(path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write
