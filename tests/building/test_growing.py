"""A codebook that grows is the codebook of all its images."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from codebook import models
from codebook.building import SurvivorPool, build, extend, merge, open_images
from codebook.building.sheet import sheet
from codebook.errors import CodebookError
from codebook.store.codebook import Codebook
from codebook.store.registry import index_folder
from tests.building.folders import contents, interrupt, run
from tests.building.tiny import settings
from tests.store.books import reseal


@pytest.fixture(scope="module")
def parts(pictures, tmp_path_factory):
    """The pictures in two halves, by JSONL lists of one folder, so that their names are those of the folder."""
    names = sorted(p.relative_to(pictures).as_posix() for p in pictures.rglob("*") if p.is_file())
    lists = []
    for half in (names[::2], names[1::2]):
        lists.append(pictures / f"{len(lists)}.jsonl")
        lists[-1].write_text("".join(json.dumps({"image": name}) + "\n" for name in half))
    yield lists
    for path in lists:
        path.unlink()


@pytest.fixture(scope="module")
def halves(tiny, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    for i, part in enumerate(parts):
        run(tiny, part, folder / str(i))
    return folder / "0", folder / "1"


@pytest.fixture(scope="module")
def whole(tiny, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run(tiny, pictures, out)
    return contents(out)


def test_pool_is_what_the_build_found(tiny, pictures, tmp_path):
    book = run(tiny, pictures, tmp_path / "out")
    again, pool = SurvivorPool.load(tmp_path / "out")
    assert torch.equal(again.prototypes, book.prototypes)
    assert len(pool.rows) == len(pool.features) == book.config["funnel"]["JSD"] > len(book)
    assert pool.funnel == {k: v for k, v in book.config["funnel"].items() if k != "recurrent"}
    order = [(row["image"], row["row"], row["col"]) for row in pool.rows]
    assert order == sorted(order) and list(pool.images) == sorted(pool.images) and len(pool.images) == 8


def test_extended_equals_built_from_all(tiny, halves, parts, tmp_path, whole):
    before = contents(halves[0])
    states = []
    extend(*tiny, halves[0], parts[1], tmp_path / "out", progress=states.append)
    assert [s.total for s in states] == [4] * 6
    assert contents(tmp_path / "out") == whole and contents(halves[0]) == before
    again = []
    extend(*tiny, halves[0], parts[1], tmp_path / "out", progress=again.append)
    assert len(again) == 1 and again[0].done == 8


def test_merged_equals_built_from_all(halves, tmp_path, whole):
    for i, (a, b) in enumerate((halves, halves[::-1])):
        merge(a, b, tmp_path / str(i))
        assert contents(tmp_path / str(i)) == whole
    merge(*halves, tmp_path / "0")  # again: nothing to do
    both = merge(tmp_path / "0", halves[0], tmp_path / "more")  # its images are in there already
    assert contents(tmp_path / "more") == whole and both.config["images"]["used"] == 8


def test_the_models_horizon_goes_along(tiny, halves, parts, tmp_path, whole, monkeypatch):
    """It is about the model and not about the images; that of another tower is left behind."""
    first, second = (Path(shutil.copytree(half, tmp_path / half.name)) for half in halves)

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    curve = {"loss": [0.0], "error": [None], "layer": 0, "interval": [0, 0], "safe": 1}

    def put(folder, fingerprint, eps):
        content = {"eps": eps, "start": 0, "horizons": {"mean": curve}, "fingerprint": fingerprint}
        (folder / "horizon.json").write_text(json.dumps(content))
        return (folder / "horizon.json").read_bytes()

    horizon = put(second, models.whole_fingerprint(tiny[0]), 0.01)
    extend(*tiny, second, parts[0], tmp_path / "extended")
    merge(first, second, tmp_path / "merged")
    put(first, "llava:1-0000:1-0000:1-0000", 0.02)
    extend(*tiny, first, parts[1], tmp_path / "without")
    merge(first, second, tmp_path / "of-the-second")
    for name in ("extended", "merged", "of-the-second"):
        assert contents(tmp_path / name) == whole | {"horizon.json": horizon}
    assert contents(tmp_path / "without") == whole
    with monkeypatch.context() as full, pytest.raises(OSError):
        full.setattr("codebook.store.codebook.Codebook.save", full_disk)
        merge(first, second, tmp_path / "late")
    merge(first, second, tmp_path / "late")  # the same command goes on
    assert contents(tmp_path / "late") == whole | {"horizon.json": horizon}
    (first / "horizon.json").write_text("[]")
    with pytest.raises(CodebookError, match=r"horizon\.json.*make one with `codebook horizon --out`"):
        extend(*tiny, first, parts[1], tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_interrupted_extension_goes_on(tiny, halves, parts, tmp_path, whole):
    def stop(state):
        if state.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extend(*tiny, halves[0], parts[1], tmp_path / "out", progress=stop)
    with pytest.raises(CodebookError, match="is from a run with another extends"):
        extend(*tiny, halves[1], parts[1], tmp_path / "out")
    states = []
    extend(*tiny, halves[0], parts[1], tmp_path / "out", progress=states.append)
    assert states[0].resumed == 2 and contents(tmp_path / "out") == whole


def test_images_that_are_in_already_are_not_probed_again(tiny, pictures, halves, tmp_path, whole):
    states = []
    extend(*tiny, halves[0], pictures, tmp_path / "out", progress=states.append)
    assert states[0].total == 4 and contents(tmp_path / "out") == whole


def test_only_names_that_are_taken_get_their_folder_first(tiny, halves, pictures, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    for name in ("1.jpg", "2.png"):
        Image.open(pictures / name).rotate(90).resize((30, 30)).save(new / name)
    book = extend(*tiny, halves[0], new, tmp_path / "out")
    names = set(SurvivorPool.load(tmp_path / "out")[1].images)
    assert names == {*SurvivorPool.load(halves[0])[1].images, "new/1.jpg", "2.png"}
    assert book.config["images"]["used"] == 6
    other = tmp_path / "other" / "new"
    shutil.copytree(new, other)
    Image.new("RGB", (24, 24)).save(other / "1.jpg")
    with pytest.raises(CodebookError, match=r"different images have the same name .*\(1 name, new/1\.jpg first\)"):
        extend(*tiny, tmp_path / "out", other, tmp_path / "out2")


def test_what_cannot_grow(tiny, halves, parts, pictures, tmp_path):
    build(*tiny, parts[1], tmp_path / "strict", model_id="tiny", settings=settings(tau_p=0.19))
    with pytest.raises(CodebookError, match="another tau_p: they do not merge"):
        merge(halves[0], tmp_path / "strict", tmp_path / "out")
    Codebook.load(halves[0]).save(tmp_path / "bare")
    with pytest.raises(CodebookError, match=r"does not keep the survivors.*build it again"):
        extend(*tiny, tmp_path / "bare", parts[1], tmp_path / "out")
    with pytest.raises(CodebookError, match="is the codebook to extend"):
        extend(*tiny, halves[0], parts[1], halves[0])
    from tests.tiny import llava

    with pytest.raises(CodebookError, match="another tower or projector"):
        extend(llava(layers=2, seed=1), tiny[1], halves[0], parts[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    damaged = tmp_path / "damaged"
    shutil.copytree(halves[0], damaged)
    for name, data in (("images.jsonl", b"{}"), ("survivors.safetensors", b"x")):
        (damaged / name).write_bytes(data)
        with pytest.raises(CodebookError, match=f"{name} is damaged|images.jsonl is damaged"):
            SurvivorPool.load(damaged)


@pytest.mark.parametrize("change, merging, extending", [
    ({"grid": [7, 6]}, "another grid: they do not merge", "was built with 7 x 6 visual tokens.*makes 6 x 6"),
    (
        {"language_model": "1-0000"},
        "another language_model: they do not merge",
        "odd was built with another language model behind this vision tower, .*: build one of all images with this",
    ),
    ({"pad": 99}, "another pad: they do not merge", "built with pad token 99"),
    ({"grid": [6, 1]}, "it does not fit the prototypes", "it does not fit the prototypes"),
    ({"settings": {"tau_p": 5.0}}, "settings of .*odd are not .*tau_p is 5", "settings of .*odd are not .*tau_p is 5"),
    ({}, "it does not fit the prototypes", "it does not fit the prototypes"),
])  # fmt: skip
def test_what_does_not_fit_a_codebook_that_grows(tiny, halves, parts, tmp_path, change, merging, extending):
    """Also a patch outside of the grid, and a threshold that is none; without a change, survivors of NaN."""
    odd = tmp_path / "odd"
    shutil.copytree(halves[0], odd)
    if not change:
        features = load_file(odd / "survivors.safetensors")["features"]
        save_file({"features": features.index_fill(0, torch.tensor([1]), torch.nan)}, odd / "survivors.safetensors")
    reseal(odd, **change)
    with pytest.raises(CodebookError, match=merging):
        merge(halves[1], odd, tmp_path / "out")
    with pytest.raises(CodebookError, match=extending):
        extend(*tiny, odd, parts[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sheet(tiny, pictures, halves, tmp_path):
    book = Codebook.load(halves[0])
    page = sheet(book.provenance, tuple(book.config["grid"]), [open_images(pictures)], "title")
    clusters = len({row["cluster"] for row in book.provenance})
    assert page.height > 100 * min(clusters, 12) and page.width > 1000
    assert len(page.getcolors(10**6)) > 100, "pictures are on it"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(CodebookError, match="none of the codebook's images is there"):
        sheet(book.provenance, (6, 6), [open_images(tmp_path)], "title")
    for place in ({"row": 6}, {"col": 2**40}):
        with pytest.raises(CodebookError, match=r"outside of the grid of 6 x 6: rebuild"):
            sheet([book.provenance[0] | place], (6, 6), [open_images(pictures)], "title")


def test_exhaustive_build_has_the_same_prototypes(tiny, pictures, tmp_path, whole):
    book = run(tiny, pictures, tmp_path / "out", exhaustive=True, batch_size=3)
    found = contents(tmp_path / "out")
    assert found["prototypes.safetensors"] == whole["prototypes.safetensors"]
    rows = [json.loads(line) for line in found["probes.jsonl"].splitlines()]
    assert len(rows) == 8 * 36 and set(rows[0]) == {
        "image", "row", "col", "p1", "jsd_region", "jsd_global", "cluster_size",
    }  # fmt: skip
    plain = [json.loads(line) for line in whole["provenance.jsonl"].splitlines()]
    assert [(r["image"], r["row"], r["col"], r["cluster"]) for r in plain] == [
        (r["image"], r["row"], r["col"], r["cluster"]) for r in book.provenance
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_codebook_does_not_depend_on_the_batch_size(tiny, pictures, tmp_path, whole, batch_size):
    run(tiny, pictures, tmp_path / "out", batch_size=batch_size)
    assert (tmp_path / "out" / "prototypes.safetensors").read_bytes() == whole["prototypes.safetensors"]


def test_half_precision_builds(pictures, tmp_path):
    from tests.building.tiny import model, processor

    book = build(model().bfloat16(), processor(), pictures, tmp_path / "out", model_id="tiny", settings=settings())
    assert book.config["dtype"] == "torch.bfloat16" and book.prototypes.dtype == torch.float32
    assert Path(tmp_path / "out" / "survivors.safetensors").is_file()


def noise(path, seed, size=(24, 24)):
    """A bitmap: of the same size in bytes whatever is on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size).save(path)


def bitmaps(folder, seeds):
    for i, seed in enumerate(seeds):
        noise(folder / f"{i}.bmp", seed)
    return folder


def used(folder):
    """For each image that counts, by its name, the SHA-256 it is known by."""
    return {name: image["stamp"] for name, image in SurvivorPool.load(folder)[1].images.items() if "funnel" in image}


def test_other_pixels_under_a_known_name_and_size_are_another_picture(tiny, tmp_path):
    one, other = bitmaps(tmp_path / "one", [1, 2, 3]), bitmaps(tmp_path / "other", [1, 2, 4])
    assert (one / "2.bmp").stat().st_size == (other / "2.bmp").stat().st_size
    run(tiny, one, tmp_path / "book")
    with pytest.raises(CodebookError, match="another images_sha256"):
        run(tiny, other, tmp_path / "book")
    states = []
    book = extend(*tiny, tmp_path / "book", other, tmp_path / "more", progress=states.append)
    assert states[0].total == 1 and book.config["images"]["used"] == 4
    assert used(tmp_path / "more") == {**used(tmp_path / "book"), "other/2.bmp": open_images(other).digests()["2.bmp"]}
    run(tiny, other, tmp_path / "second")
    with pytest.raises(CodebookError, match=r"different images have the same name in the two \(1 name, 2\.bmp first\)"):
        merge(tmp_path / "book", tmp_path / "second", tmp_path / "merged")


def test_a_resumed_build_probes_other_pixels_under_a_known_name(tiny, tmp_path):
    images = bitmaps(tmp_path / "in", [1, 2, 3, 4])
    interrupt(tiny, images, tmp_path / "out", at=3)
    noise(images / "0.bmp", 9)
    states = []
    run(tiny, images, tmp_path / "out", progress=states.append)
    assert states[0].resumed == 2
    run(tiny, images, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_renamed_picture_is_not_probed_again(tiny, tmp_path):
    images = bitmaps(tmp_path / "in", [1, 2, 3, 4])
    interrupt(tiny, images, tmp_path / "out", at=3)
    for i in range(4):
        (images / f"{i}.bmp").rename(images / f"picture {i}.bmp")
    states = []
    run(tiny, images, tmp_path / "out", progress=states.append)
    run(tiny, images, tmp_path / "fresh")
    assert states[0].resumed == 3 and contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_picture_that_changes_while_it_is_probed_is_not_taken(tiny, tmp_path):
    images = bitmaps(tmp_path / "in", [1, 2, 3, 4])

    def change(state):
        if state.done == 1:
            noise(images / "3.bmp", 9)

    book = run(tiny, images, tmp_path / "out", progress=change)
    assert book.config["images"] == {"used": 3, "skipped": ["3.bmp"]}
    assert "it changed while" in SurvivorPool.load(tmp_path / "out")[1].images["3.bmp"]["error"]


def test_copies_count_once_however_a_codebook_came_about(tiny, tmp_path):
    """Copies inside a folder, and across the folders that are extended and merged."""
    whole = bitmaps(tmp_path / "whole", [1, 2, 3, 1, 2, 5, 1])
    for part, names in (("a", "1240"), ("b", "3156"), ("c", "235")):
        (tmp_path / part).mkdir()
        for name in names:
            shutil.copy(whole / f"{name}.bmp", tmp_path / part / f"{name}.bmp")
    book = run(tiny, whole, tmp_path / "book")
    assert book.config["images"] == {"used": 4, "skipped": [], "duplicates": 3}
    assert set(used(tmp_path / "book")) == {"0.bmp", "1.bmp", "2.bmp", "5.bmp"}
    assert {row["image"] for row in book.provenance} <= {"0.bmp", "1.bmp", "2.bmp", "5.bmp"}
    expected = contents(tmp_path / "book")
    for part in "abc":
        run(tiny, tmp_path / part, tmp_path / f"book-{part}")
    assert set(used(tmp_path / "book-b")) == {"1.bmp", "3.bmp", "5.bmp"}
    for first, second in ("ab", "ba"):
        merge(tmp_path / f"book-{first}", tmp_path / f"book-{second}", tmp_path / f"merged-{first}")
        assert contents(tmp_path / f"merged-{first}") == expected
        states = []
        extend(*tiny, tmp_path / f"book-{first}", tmp_path / second, tmp_path / f"ext-{first}", progress=states.append)
        assert contents(tmp_path / f"ext-{first}") == expected and states[0].total == {"a": 1, "b": 1}[first]
    merge(tmp_path / "book", tmp_path / "book-c", tmp_path / "more")
    assert contents(tmp_path / "more") == expected


def old(folder, stamp):
    """Make a codebook as earlier versions wrote it: a size in the place of each digest."""
    lines = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    (folder / "images.jsonl").write_text("".join(json.dumps(line | {"stamp": stamp(line)}) + "\n" for line in lines))
    reseal(folder)
    return folder


def test_codebooks_of_earlier_versions_grow_where_nothing_is_guessed(tiny, tmp_path):
    images = bitmaps(tmp_path / "in", [1, 2, 3, 4])
    run(tiny, images, tmp_path / "new")
    size = (images / "0.bmp").stat().st_size
    before = old(Path(shutil.copytree(tmp_path / "new", tmp_path / "old")), lambda line: size)
    with pytest.raises(CodebookError, match=r"0\.bmp may be the image of that name and size.*rename it, or build"):
        extend(*tiny, before, images, tmp_path / "x")
    other = bitmaps(tmp_path / "other", [6])
    noise(other / "0.bmp", 6, (30, 30))
    noise(other / "new.bmp", 7)
    extend(*tiny, before, other, tmp_path / "grown")
    assert set(used(tmp_path / "grown")) == {*(f"{i}.bmp" for i in range(4)), "other/0.bmp", "new.bmp"}
    # Merged with what is known better, it takes the digests over: the images yielded the same.
    for i, (a, b) in enumerate(((before, tmp_path / "new"), (tmp_path / "new", before))):
        merge(a, b, tmp_path / f"merged{i}")
        assert contents(tmp_path / f"merged{i}") == contents(tmp_path / "new")
    merge(before, before, tmp_path / "itself")
    assert used(tmp_path / "itself") == {f"{i}.bmp": size for i in range(4)}
    run(tiny, bitmaps(tmp_path / "in2", [1, 2, 3, 8]), tmp_path / "new2")
    with pytest.raises(CodebookError, match=r"different images have the same name in the two \(1 name, 3\.bmp first\)"):
        merge(before, tmp_path / "new2", tmp_path / "x")
    data_set = old(Path(shutil.copytree(tmp_path / "new", tmp_path / "set")), lambda line: "0123456789abcdef")
    with pytest.raises(CodebookError, match=r"0\.bmp may be the image"):
        extend(*tiny, data_set, images, tmp_path / "x")


def test_the_shipped_codebook_grows(tmp_path):
    from codebook import miniature, models

    shipped = index_folder() / "miniature"
    loaded = models.load("miniature", "cpu")
    noise(tmp_path / "in" / "noise.png", 1, (96, 96))
    miniature.write_images(tmp_path / "in", 1, seed=5)
    book = extend(*loaded, shipped, tmp_path / "in", tmp_path / "out")
    assert book.config["images"]["used"] == 122
    assert {"in/000000.png", "000000.png", "noise.png"} <= set(used(tmp_path / "out"))
    again = merge(shipped, tmp_path / "out", tmp_path / "merged")
    assert again.config["images"]["used"] == 122 and contents(tmp_path / "merged") == contents(tmp_path / "out")


def test_a_model_that_answers_nan_is_named(pictures, tmp_path):
    from tests.building.tiny import model, processor

    damaged = model()
    damaged.lm_head.weight.data[3] = float("nan")
    with pytest.raises(CodebookError, match=r"not numbers \(NaN\): its weights are damaged"):
        build(damaged, processor(), pictures, tmp_path / "out", model_id="tiny", settings=settings())
