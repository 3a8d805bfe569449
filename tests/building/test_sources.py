import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable

import pytest
from PIL import Image

from codebook.building import build, open_images
from codebook.errors import CodebookError
from tests.building.folders import contents, run


def names(images, **options):
    return list(open_images(images, **options).names)


@pytest.fixture
def shard(pictures, tmp_path) -> Callable:
    """A tar shard of the pictures, as WebDataset has them, with labels beside them."""

    def make(path, only=lambda name: True):
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for picture in sorted(p for p in pictures.rglob("*") if p.is_file()):
                name = picture.relative_to(pictures).as_posix()
                if only(name):
                    tar.add(picture, name)
                    label = tarfile.TarInfo(f"{name.partition('.')[0]}.cls")
                    label.size = 1
                    tar.addfile(label, io.BytesIO(b"7"))
        return path

    return make


def test_folder(pictures):
    assert names(pictures) == sorted(names(pictures)) and len(names(pictures)) == 8
    assert names(pictures, limit=3) == names(pictures)[:3]
    digests = open_images(pictures).digests()
    assert digests["1.jpg"] == hashlib.sha256((pictures / "1.jpg").read_bytes()).hexdigest()


def test_every_source_gives_the_same_codebook(tiny, pictures, shard, tmp_path):
    run(tiny, pictures, tmp_path / "folder")
    expected = contents(tmp_path / "folder")
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps({"image": str(pictures / name)} if i % 2 else str(pictures / name))
                  for i, name in enumerate(names(pictures)))
    )  # fmt: skip
    run(tiny, shard(tmp_path / "in.tar"), tmp_path / "shard")
    assert contents(tmp_path / "shard") == expected
    book = run(tiny, tmp_path / "list.jsonl", tmp_path / "list")
    assert (tmp_path / "list" / "prototypes.safetensors").read_bytes() == expected["prototypes.safetensors"]
    assert book.provenance[0]["image"].startswith(str(pictures)), "as the list has it"


def test_folder_of_shards(pictures, shard, tmp_path):
    shard(tmp_path / "in" / "0.tar", lambda name: name < "4")
    shard(tmp_path / "in" / "1.tar", lambda name: name >= "4")
    found = open_images(tmp_path / "in")
    assert list(found.names) == [f"{int(name >= '4')}.tar/{name}" for name in names(pictures)]
    for name in found.names:
        assert found.read(name).tobytes() == open_images(pictures).read(name[6:]).tobytes()


def test_shard_that_breaks_off_yields_what_is_whole(tiny, pictures, shard, tmp_path):
    path = shard(tmp_path / "in.tar")
    places = open_images(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index((pictures / "6.png").read_bytes()) + 30])
    cut = names(path)
    assert "6.png" in cut and "7.jpg" not in cut and set(cut) < set(places.names)
    book = run(tiny, path, tmp_path / "out")
    assert book.config["images"]["skipped"] == ["6.png"]
    listed = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    [skipped] = [line for line in listed if "error" in line]
    assert skipped["image"] == "6.png" and "0x" not in skipped["error"] and str(tmp_path) not in json.dumps(listed)
    path.write_bytes(b"nothing like a tar")
    with pytest.raises(CodebookError, match=r"cannot read .*in\.tar"):
        open_images(path)


def test_list_with_missing_and_bad_lines(tiny, pictures, tmp_path):
    source = tmp_path / "in.jsonl"
    good = [str(pictures / name) for name in names(pictures)]
    source.write_text("\n".join(map(json.dumps, [*good, "gone.png"])))
    assert run(tiny, source, tmp_path / "out").config["images"]["skipped"] == ["gone.png"]
    for line in ("{", '{"picture": 1}', "3"):
        source.write_text(f'"a.png"\n{line}\n')
        with pytest.raises(CodebookError, match="line 2: write"):
            open_images(source)


def test_saved_data_set(tiny, pictures, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [str(pictures / name) for name in names(pictures)]
    rows = datasets.Dataset.from_dict({"label": [1] * 8, "image": files}).cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "in")
    assert names(tmp_path / "in") == [f"{i:08d}" for i in range(8)]
    run(tiny, tmp_path / "in", tmp_path / "out")
    run(tiny, pictures, tmp_path / "folder")
    for name in ("prototypes.safetensors", "survivors.safetensors"):
        assert contents(tmp_path / "out")[name] == contents(tmp_path / "folder")[name]
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(CodebookError, match="several splits: give the folder of one"):
        open_images(tmp_path / "splits")


def test_data_set_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CodebookError, match="install codebook"):
        open_images(tmp_path)


def test_nothing_to_take_images_from(tiny, tmp_path):
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text("\n")
    for source, message in (
        (tmp_path / "none", "no such folder"), (tmp_path / "x.txt", "cannot take images from"),
        (tmp_path / "empty.jsonl", "no image in"), (tmp_path, "no image in"),
    ):  # fmt: skip
        with pytest.raises(CodebookError, match=message):
            build(*tiny, source, tmp_path / "out", model_id="miniature")


def test_upright_and_rgb(tmp_path):
    turned = Image.new("L", (20, 10))
    exif = turned.getexif()
    exif[0x0112] = 6  # as a camera held sideways writes it
    turned.save(tmp_path / "a.jpg", exif=exif)
    image = open_images(tmp_path).read("a.jpg")
    assert image.size == (10, 20) and image.mode == "RGB"
