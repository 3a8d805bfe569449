"""A codebook that grows is the codebook of all its images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from codebook.building import SurvivorPool, build, extend, merge, open_images
from codebook.building.sheet import sheet
from codebook.errors import CodebookError
from codebook.store.codebook import Codebook
from tests.building.folders import contents, run
from tests.building.tiny import settings


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
    with pytest.raises(CodebookError, match=r"1 names, new/1\.jpg first, are of different images"):
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


def test_sheet(tiny, pictures, halves, tmp_path):
    book = Codebook.load(halves[0])
    page = sheet(book.provenance, tuple(book.config["grid"]), [open_images(pictures)], "title")
    clusters = len({row["cluster"] for row in book.provenance})
    assert page.height > 100 * min(clusters, 12) and page.width > 1000
    assert len(page.getcolors(10**6)) > 100, "pictures are on it"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(CodebookError, match="none of the codebook's images is there"):
        sheet(book.provenance, (6, 6), [open_images(tmp_path)], "title")


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
