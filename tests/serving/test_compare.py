"""`/v1/compare`: every way's answer is the one that `ask` gives under the same schedule."""

import httpx
import pytest
import torch

from benchmarks.served import data_url
from benchmarks.served import sample_body as body
from codebook.inference.ask import ask
from codebook.miniature.samples import of_miniature
from codebook.models.layout import Grid, Image, Layout
from codebook.pruning import Schedule
from codebook.pruning.kept_map import kept_map


@pytest.fixture(scope="module")
def sample():
    [one] = of_miniature("test", 0, 1, ["ocr"])
    return one


def comparison(sample, *ways, **fields):
    named = [{"method": method, "keep": keep} for method, keep in ways]
    return {"image": data_url(sample.pictures()[0]), "question": sample.question, "ways": named, **fields}


def compare(service, asked):
    return httpx.post(f"{service.url}/v1/compare", json=asked, timeout=60)


def test_ways_equal_ask(service, loaded, sample):
    model, processor, own = loaded
    ways = [("divprune", 0.3), ("pyramiddrop", 0.5), ("unpruned", 1.0)]
    found = compare(service, comparison(sample, *ways)).raise_for_status().json()["ways"]
    for way, (method, keep) in zip(found, ways, strict=True):
        schedule = None if method == "unpruned" else Schedule.for_model(model, method, keep)
        [expected] = ask(model, processor, [sample.pictures()], [sample.question], schedule)
        [grid] = way["grids"]
        assert way["answer"] == expected.text and way["method"] == method and way["keep"] == keep
        assert [way["seen"], way["kept"]] == [144, len(expected.kept[0])] and way["seconds"] > 0
        assert (grid["kind"], grid["rows"], grid["cols"], grid["box"]) == ("view", 12, 12, [0, 0, 1, 1])
        assert [144, *(len(stage["kept"][0]) for stage in way["stages"])] == expected.counts[0]
        assert not schedule or way["stages"][-1]["kept"] == expected.kept
    # The schedule of the service is still what chats are pruned by.
    answer = httpx.post(f"{service.url}/v1/chat/completions", json=body(sample), timeout=60).json()
    assert answer["usage"]["codebook"]["kept"] == own.counts(144, 12)[-1]


def test_what_is_offered_works_without_more_than_a_budget(service):
    offer = httpx.get(f"{service.url}/v1/compare").raise_for_status().json()
    names = [method["name"] for method in offer["methods"]]
    assert names[0] == "seeded-middle" and len(set(names)) == len(names)
    assert {"codebook", "random", "fastv", "cls", "cdpruner", "pyramiddrop"} <= set(names)
    assert not {"drop", "codebook-threshold", "unpruned"} & set(names)  # a layer, a threshold; and no method
    assert all(method["about"].endswith(".") for method in offer["methods"])


def test_what_is_offered_is_described_in_sentences(service):
    """Methods that differ from their class by an option say what it does, in the option's own words."""
    offered = {one["name"]: one["about"] for one in httpx.get(f"{service.url}/v1/compare").json()["methods"]}
    assert offered["seeded-middle"] == (
        "Farthest-point sampling in which the codebook's prototypes count as chosen. Keep the middle one, in raster "
        "order, of those that each chosen token stands for in its place (`middles`). With mass-preserving attention."
    )
    assert not [name for name, about in offered.items() if "=True" in about and "A preset: " not in about]


def test_a_way_that_cannot_answer_says_so_beside_the_others(service, sample):
    found = (
        compare(service, comparison(sample, ("pyramiddrop", 0.1), ("random", 0.1))).raise_for_status().json()["ways"]
    )
    assert "out of reach" in found[0]["error"] and "answer" not in found[0]
    assert found[1]["kept"] == 14


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ways": [{"method": "drop", "keep": 0.5}]}, "no method 'drop' is offered"),
        ({"ways": [{"method": "random@3:0.5"}]}, "is offered here"),
        ({"ways": []}, "ways"),
        ({"ways": [{"method": "random"}] * 5}, "ways"),
        ({"ways": [{"method": "random", "keep": 0}]}, "ways.0.keep"),
        ({"ways": [{"method": "random", "keep": 1.01}]}, "ways.0.keep"),
        ({"ways": [{"method": "random", "keep": "0.5"}]}, "ways.0.keep"),
        ({"max_tokens": 10**6}, "max_tokens is 1000000"),
        ({"image": "file:///etc/passwd"}, "data URL"),
        ({"question": "what is the weather?"}, "weather"),
        ({"model": "other"}, "model"),
    ],
)
def test_refusals(service, sample, change, words):
    answer = compare(service, comparison(sample, ("random", 0.5)) | change)
    assert answer.status_code == 422 and words in answer.json()["error"]["message"]


def test_a_map_of_several_grids():
    """A view of 2 x 2 tokens and a crop of 1 x 3, whose row ends with a newline that is no visual token."""
    grids = (Grid(0, 2, 2), Grid(4, 1, 3, "crop", stride=4, box=None))
    image = Image("image", Layout(8, grids), tuple(range(8)))
    schedule = Schedule.parse("random@0:4, drop@2")
    assert kept_map(
        image, schedule, [torch.tensor([1, 3, 4, 6]), torch.tensor([], dtype=torch.long)], (0.25, 0, 0.75, 1)
    ) == {
        "grids": [
            {"kind": "view", "rows": 2, "cols": 2, "box": (0.25, 0, 0.75, 1)},
            {"kind": "crop", "rows": 1, "cols": 3, "box": None},
        ],
        "stages": [
            {"layer": 0, "stage": "random:4", "kept": [[1, 3], [0, 2]]},
            {"layer": 2, "stage": "drop@2", "kept": [[], []]},
        ],
    }
