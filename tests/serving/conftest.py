"""One service of the miniature per module."""

import pytest

import codebook
from codebook.pruning import Schedule
from tests.serving.running import Service


@pytest.fixture(scope="session")
def loaded():
    model, processor = codebook.load("miniature", "cpu")
    return model, processor, Schedule.for_model(model, "seeded", 0.2)


@pytest.fixture(scope="module")
def service(loaded):
    running = Service(*loaded)
    yield running
    running.stop()
