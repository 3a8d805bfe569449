"""What a schedule's position policy does to a model that was trained on whole images."""

import pytest

from codebook import Schedule, load
from codebook.evaluation import evaluate, mean
from codebook.miniature import tasks
from codebook.miniature.samples import of_questions


@pytest.fixture(scope="module")
def lost():
    """Loads the miniature; gives the share of 60 questions that are lost by renumbering the same kept tokens."""
    model, processor = load("miniature")

    def call(family):
        questions = of_questions(tasks(family, "test", 5, 60))
        keep, compact = (
            mean(evaluate(model, processor, questions, Schedule.parse(f"divprune:0.25; positions={positions}")))
            for positions in ("keep", "compact")
        )
        return keep - compact

    return call


def test_compact_positions_lose_places(lost):
    """Where things are is read off positions, what there is is not; so with VisionZip in arXiv 2412.13180."""
    assert lost("loc") > 0.06
    assert abs(lost("exist")) < 0.06
