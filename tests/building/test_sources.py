import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable

import pytest
from PIL import Image

from codebook.building import build, left_out_words, open_images
from codebook.errors import CodebookError
from tests.building.folders import contents, run


def names(images, **options):
    return list(open_images(images, **options).names)


@pytest.fixture
def cli(request):
    return request.getfixturevalue("run")


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
    with pytest.raises(CodebookError, match=r"install 'redundancy-codebook\[datasets\]'"):
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


def save(path, level, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path, **options)


def test_links_to_folders_and_loops(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    save(root / "a" / "1.png", 1)
    save(outside / "2.png", 2)
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(".")
    (root / "b").symlink_to(outside)
    (root / "c").symlink_to(root / "b")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "d.png").symlink_to(outside / "2.png")
    (root / "0").symlink_to(root / "a")  # by its own name first
    source = open_images(root)
    assert source.names == ("a/1.png", "b/2.png", "d.png", "gone.png") and not source.left_out
    digests = source.digests()
    assert digests["b/2.png"] == digests["d.png"] and digests["gone.png"] == ""


def test_every_kind_of_file_is_taken_or_counted(tmp_path):
    for i, suffix in enumerate(("tif", "TIFF", "gif", "jfif", "avif", "ppm", "pgm", "bmp", "webp", "JPG")):
        save(tmp_path / f"{i}.{suffix}", i, format={"jfif": "JPEG", "JPG": "JPEG"}.get(suffix))
    save(tmp_path / "no suffix", 20, format="PNG")
    save(tmp_path / "odd.suffix", 21, format="JPEG")
    for name in ("a.heic", "b.HEIC", "c.svg", "more.zip", "shard.tar.gz"):
        (tmp_path / name).write_bytes(b"....ftypheic")
    for name in ("notes.txt", "README", "labels.json", "Python.md", ".DS_Store"):
        (tmp_path / name).write_text("Python {}")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    source = open_images(tmp_path)
    assert len(source.names) == 12 and {"no suffix", "odd.suffix", "0.tif"} <= set(source.names)
    assert [source.read(name).getpixel((0, 0))[0] for name in ("0.tif", "2.gif", "odd.suffix")] == [0, 2, 21]
    assert source.left_out == {".heic": 2, ".svg": 1, ".zip": 1, ".gz": 1, "that is no regular file": 1}
    assert left_out_words(source.left_out) == "1 .gz, 2 .heic, 1 .svg, 1 .zip, 1 that is no regular file"


def test_what_is_left_out_is_said_at_the_end(cli, tmp_path):
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png", 80 * i)
    shutil.copy(tmp_path / "in" / "0.png", tmp_path / "in" / "copy.png")
    (tmp_path / "in" / "x.heic").write_bytes(b"")
    command = ["build", "miniature", "--images", tmp_path / "in", "--out", tmp_path / "out"]
    code, out, err = cli(*command, "--tau-p", 1, "--tau-j", 99, "--min-image-fraction", 0)
    assert code == 0 and "from 3 images" in out
    assert "left out, not readable as images: 1 .heic" in err and "counted once: 1 files are exact copies" in err


def test_names_that_are_no_text(tmp_path, tiny):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    save(tmp_path / "x.png", 3)
    os.rename(tmp_path / "x.png", path)
    source = open_images(tmp_path)
    assert source.names == ("caf\\xe9.png",) and source.read("caf\\xe9.png").getpixel((0, 0)) == (3, 3, 3)


def test_names_that_are_printed_alike(tmp_path):
    (tmp_path / "in").mkdir()
    for level, name in enumerate((b"\\xe9.png", b"\xe9.png")):  # four characters, and one byte that is no UTF-8
        save(tmp_path / "x.png", level)
        os.rename(tmp_path / "x.png", os.fsencode(tmp_path) + b"/in/" + name)
    for source in (open_images(tmp_path / "in"), open_images(sorted((tmp_path / "in").iterdir()))):
        assert source.names == ("\\xe9.png", "\\xe9.png#2")
        assert [source.read(name).getpixel((0, 0))[0] for name in source.names] == [0, 1]


def test_tar_with_links_and_repeated_names(tmp_path):
    data = {}
    for level in (1, 2):
        buffer = io.BytesIO()
        Image.new("L", (8, 8), level).save(buffer, "PNG")
        data[level] = buffer.getvalue()

    def add(tar, name, level=None, **fields):
        member = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(member, field, value)
        member.size = len(data[level]) if level else 0
        tar.addfile(member, io.BytesIO(data[level]) if level else None)

    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        add(tar, "a/x.png", 1)
        add(tar, "a/x.png", 2)
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="a/x.png")
        add(tar, "a/soft.png", type=tarfile.SYMTYPE, linkname="x.png")
        add(tar, "nothing.png", type=tarfile.SYMTYPE, linkname="../../etc/passwd")
        add(tar, "unnamed", 1)
        add(tar, "x.heic", 1)
        add(tar, "x.cls", None)
    source = open_images(tmp_path / "in.tar")
    assert source.names == ("a/soft.png", "a/x.png", "a/x.png#2", "hard.png", "unnamed")
    assert [source.read(name).getpixel((0, 0))[0] for name in source.names] == [2, 1, 2, 2, 1]
    assert source.left_out == {".heic": 1, "link to nothing in a tar file": 1}


def test_a_tar_beside_a_picture_is_taken_too(shard, pictures, tmp_path):
    shard(tmp_path / "in" / "0.TAR")
    save(tmp_path / "in" / "stray.png", 1)
    source = open_images(tmp_path / "in")
    assert len(source.names) == 9 and "0.TAR/1.jpg" in source.names and "stray.png" in source.names


def test_many_folders_that_link_to_each_other(tmp_path):
    """Every folder links to all: walked path by path that would be 12! folders."""
    for i in range(12):
        save(tmp_path / str(i) / "x.png", i)
    for i in range(12):
        for j in range(12):
            (tmp_path / str(i) / f"to{j}").symlink_to(tmp_path / str(j))
    assert open_images(tmp_path).names == tuple(sorted(f"{i}/x.png" for i in range(12)))


def test_pointers_of_git_lfs_are_skipped_by_that_name(tiny, pictures, tmp_path):
    images = shutil.copytree(pictures, tmp_path / "in")
    (images / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    run(tiny, images, tmp_path / "out")
    listed = (tmp_path / "out" / "images.jsonl").read_text()
    assert "it is only a pointer of Git LFS" in listed and str(tmp_path) not in listed


def test_a_link_in_the_place_of_the_journal_is_refused(tiny, pictures, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "out" / ".build").symlink_to(tmp_path / "victim")
    with pytest.raises(CodebookError, match=r"\.build is a link: choose another --out"):
        run(tiny, pictures, tmp_path / "out")
    assert not list((tmp_path / "victim").iterdir())
