"""Scenes are the same bytes everywhere, and the splits share nothing."""

import errno
import hashlib
import os

import numpy as np
import pytest

from codebook.errors import CodebookError
from codebook.miniature import TASK_FAMILIES, tasks, write_images
from codebook.miniature.scenes import GRID, PERIODS, TRAIN_DIGITS, album, digits, film, labels, scene
from codebook.miniature.tasks import scenes_shown


def digest(split, draw, **options):
    pixels = []
    for i in range(20):
        shown = draw(split, 0, i, **options)
        pixels += [picture.pixels.tobytes() for picture in scenes_shown(shown)]
    return hashlib.sha256(b"".join(pixels)).hexdigest()[:16]


@pytest.mark.parametrize(
    ("split", "draw", "options", "expected"),
    [
        ("train", scene, {}, "e0935550175bfcee"),
        ("test", scene, {}, "97422daa7b1592c8"),
        ("train", scene, {"dense": True}, "d83f0312d8d23c86"),
        ("test", scene, {"look": "noise"}, "dc07899107c4df51"),
        ("test", scene, {"look": "scale"}, "04cf05608e3eb54b"),
        ("test", album, {}, "b94a16cab38443ee"),
        ("test", film, {}, "cf72cbf07632a3a3"),
    ],
)
def test_scenes_are_the_same_bytes_on_every_machine(split, draw, options, expected):
    assert digest(split, draw, **options) == expected


def test_splits_share_no_scene_no_digit_image_and_no_stripe_width():
    seen = {"train": set(), "test": set()}
    pictures = {"train": set(), "test": set()}
    for split in seen:
        for i in range(200):
            picture = scene(split, 0, i)
            pictures[split].add(picture.pixels.tobytes())
            seen[split].update(image for number in picture.numbers for image in number.images)
    assert max(seen["train"]) < TRAIN_DIGITS <= min(seen["test"])
    assert not pictures["train"] & pictures["test"]
    assert not set(PERIODS["train"]) & set(PERIODS["test"])


def test_an_unknown_split_or_look_names_the_known_ones():
    with pytest.raises(CodebookError, match="train, test"):
        scene("validation", 0)
    with pytest.raises(CodebookError, match="plain, photo"):
        scene("test", 0, look="painting")


def test_looks_change_the_picture_and_not_what_is_in_it():
    pytest.importorskip("skimage")
    for i in range(20):
        plain, photo, noise = (scene("test", 1, i, look=look) for look in ("plain", "photo", "noise"))
        assert (plain.things, plain.numbers) == (noise.things, noise.numbers)
        assert not (plain.pixels == noise.pixels).all()
        assert len({tuple(p) for p in photo.pixels.reshape(-1, 3).tolist()}) > 50
    sizes = {t.side for i in range(20) for t in scene("test", 1, i, look="scale").things}
    assert sizes == {12, 19}


def test_digits_are_those_of_scikit_learn():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    images, values = digits()
    assert (values == source.target).all()
    assert abs(images - source.images).max() <= 1  # four bits a pixel
    assert images.shape == (1797, 8, 8)


def test_patches_cover_what_is_drawn_and_little_else():
    coverage = []
    for i in range(100):
        picture = scene("test", 3, i)
        marks = labels(picture)
        for thing in picture.things:
            left, top, right, bottom = thing.box
            for place in thing.patches:
                x, y = place % GRID * 8, place // GRID * 8
                assert left - 8 < x < right and top - 8 < y < bottom
        busy = (marks["shape"] >= 0) | (marks["digit"] >= 0)
        assert set(np.flatnonzero(busy)) == {p for item in (*picture.things, *picture.numbers) for p in item.patches}
        coverage.append(busy.mean())
    assert 0.08 < np.mean(coverage) < 0.25


def test_objects_do_not_overlap():
    for i in range(100):
        canvas = np.zeros((96, 96), int)
        for item in (*(picture := scene("train", 5, i)).things, *picture.numbers):
            left, top, right, bottom = item.box
            canvas[top:bottom, left:right] += 1
        assert canvas.max() <= 1


def test_written_images_are_training_scenes(tmp_path):
    from PIL import Image

    paths = write_images(tmp_path / "images", 3, seed=4)
    assert [p.name for p in paths] == ["000000.png", "000001.png", "000002.png"]
    stored = np.asarray(Image.open(paths[1]))
    assert (stored == scene("train", 2, 4, 1).pixels).all()


def test_a_full_disk_leaves_whole_images(tmp_path, monkeypatch):
    before = write_images(tmp_path, 1, seed=4)[0].read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_images(tmp_path, 2, seed=5)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("000000.png", before)]


def test_images_are_not_written_through_links(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "000000.png").symlink_to("mine")
    with pytest.raises(CodebookError, match=r"000000\.png is there and no regular file"):
        write_images(tmp_path, 1)
    assert (tmp_path / "mine").read_text() == "kept"


@pytest.mark.parametrize("family", TASK_FAMILIES)
def test_questions_repeat_by_seed(family):
    first, again = list(tasks(family, "test", 1, 5)), list(tasks(family, "test", 1, 5))
    other = list(tasks(family, "test", 2, 5))
    for one, two in zip(first, again, strict=True):
        assert (one.question, one.answer, one.patches) == (two.question, two.answer, two.patches)
        assert [i.tobytes() for i in one.images] == [i.tobytes() for i in two.images]
    assert [q.images[0].tobytes() for q in first] != [q.images[0].tobytes() for q in other]
