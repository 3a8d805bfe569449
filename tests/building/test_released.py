"""Our clustering and rules against the codebooks that the method's authors published.

Set CODEBOOK_RELEASED to the folder that holds `241228-162634-llava15` and `241225-101925-llavaov`.
"""

import ast
import os
import re
from pathlib import Path

import pytest

from codebook.building.clustering import dpc_knn
from codebook.building.pool import recurrent
from codebook.building.presets import preset
from codebook.store.codebook import Codebook

RELEASED = os.environ.get("CODEBOOK_RELEASED")
pytestmark = pytest.mark.skipif(RELEASED is None, reason="set CODEBOOK_RELEASED to the published codebooks")

# folder, preset, shape, images built from, survivors in all, (members, distinct images) of the two clusters kept
TABLE = [
    ("241228-162634-llava15", "llava-1.5-7b", (454, 4096), 500, 1383, [(256, 131), (198, 98)]),
    ("241225-101925-llavaov", "llava-onevision-7b", (45, 3584), 1200, 200, [(26, 22), (19, 17)]),
]
published = pytest.mark.parametrize(("folder", "name", "shape", "images", "survivors", "kept"), TABLE)


def read(folder, name):
    files = Path(RELEASED) / folder
    book = Codebook.from_released(next(files.glob("*.pt")), next(files.glob("*.json")), model=name)
    found = re.findall(r"^cluster: \d+, samples: (\[.*\])$", (files / "clusters.txt").read_text(), re.MULTILINE)
    return book, [ast.literal_eval(members) for members in found]


@published
def test_recurrence_keeps_the_published_members(folder, name, shape, images, survivors, kept):
    book, clusters = read(folder, name)
    assert book.prototypes.shape == shape
    assert len(clusters) == preset(name).clusters and sum(map(len, clusters)) == survivors
    labels = [i for i, cluster in enumerate(clusters) for _ in cluster]
    members = [image for cluster in clusters for image in cluster]
    chosen = recurrent(labels, members, images, preset(name).min_image_fraction)
    assert [members[i] for i in chosen] == [row["image"] for row in book.provenance]
    ours = [[members[i] for i in chosen if labels[i] == label] for label in sorted({labels[i] for i in chosen})]
    assert [(len(cluster), len(set(cluster))) for cluster in ours] == kept


@published
def test_clustering_finds_the_published_partition(folder, name, shape, images, survivors, kept):
    book, _ = read(folder, name)
    first, second = kept[0][0], kept[1][0]
    for seed in range(5):
        labels = dpc_knn(book.prototypes, 2, seed=seed)
        assert sorted(labels.bincount().tolist()) == sorted([first, second])
        assert len(set(labels[:first].tolist())) == len(set(labels[first:].tolist())) == 1


def test_llava15_has_two_dense_clusters():
    book, _ = read(*TABLE[0][:2])
    norms = book.prototypes.norm(dim=1)
    assert (round(norms.min().item()), round(norms.max().item())) == (17, 68)
    medians = []
    for part in book.prototypes.split([256, 198]):
        similarity, _ = Codebook(part).search(part, k=len(part))
        medians.append(similarity[:, 1:].median().item())  # without the token itself
    assert medians == pytest.approx([0.93, 0.58], abs=0.01)
