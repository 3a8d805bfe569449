"""Timing is tested, not measured: two rounds of three tokens."""

import pytest

from codebook.evaluation import bench, latency


@pytest.fixture(scope="package", autouse=True)
def hurry():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "DECODED_TOKENS", 2)
        patch.setattr(bench, "ROUNDS", (2, 2))
        yield
