"""Outputs and devices that cannot work are refused before a model is loaded or anything is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from codebook import miniature
from codebook.cli.checks import check_output_file, check_output_folder
from codebook.cli.output import write_picture
from codebook.errors import CodebookError
from codebook.models.loading import check_device

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "indexes" / "miniature"


@pytest.fixture(autouse=True)
def unloaded(monkeypatch):
    """Loading a model is a failure."""
    monkeypatch.setattr("codebook.models.load", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("codebook.miniature.model.load_weights", lambda *_: pytest.fail("a model was loaded"))


@pytest.fixture
def place(tmp_path):
    """A folder with all that an output must not be, and a picture."""
    miniature.write_images(tmp_path / "images", 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def everything(place):
    """All paths below a folder, and what the files hold."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(place.rglob("*"))}


IMAGE = "images/000000.png"
FILES = {
    "show": ["show", "miniature", "--image", IMAGE, "--ask", "?", "--methods", "uniform", "--out"],
    "prune --show": ["prune", "miniature", "--image", IMAGE, "--ask", "?", "--show"],
    "prune --input": ["prune", "miniature", "--input", "in.jsonl", "--output"],
    "prune --tokens": ["prune", "--tokens", "in.safetensors", "--codebook", BOOK, "--output"],
    "explain": ["explain", "miniature", "--image", IMAGE, "--patch", "1,1", "--images", "images", "--sheet"],
    "inspect": ["inspect", BOOK, "--images", "images", "--sheet"],
    "evaluate": ["miniature", "evaluate", "--check"],
}
FOLDERS = {
    "build": ["build", "miniature", "--images", "images", "--out"],
    "extend": ["extend", BOOK, "--images", "images", "--out"],
    "merge": ["merge", BOOK, BOOK, "--out"],
    "bench": ["bench", "miniature", "--methods", "uniform", "--out"],
    "horizon": ["horizon", "miniature", "--data", "miniature", "--count", "1", "--out"],
    "demo": ["demo", "--out"],
    "train": ["miniature", "train", "--out"],
    "images": ["miniature", "images", "--out"],
}


@pytest.mark.parametrize("command", FILES.values(), ids=FILES)
def test_files_that_cannot_be_written(refused, place, monkeypatch, command):
    monkeypatch.chdir(place)
    before = everything(place)
    refused(*command, "folder", words=["folder is a folder", "name a file"])
    for name in ("link", "dangling", "fifo", "/dev/null"):
        refused(*command, name, words=[name, "not a regular file"])
    refused(*command, "no/where/x", words=["no folder no/where"])
    refused(*command, "file/x", words=["file/x"])
    refused(*command, "x" * 300, words=["too long", "shorter"])
    refused(*command, "x" * 4000, words=["too long", "shorter"])
    if os.path.exists("/proc/self"):
        refused(*command, "/proc/x", words=["/proc"])
    assert everything(place) == before


@pytest.mark.parametrize("name", ["show", "prune --show", "explain", "inspect"])
def test_pictures_named_as_of_another_format(refused, place, monkeypatch, name):
    """A PNG under such a name would be what its name denies."""
    monkeypatch.chdir(place)
    before = everything(place)
    refused(*FILES[name], "kept.JPG", words=["pictures are written as PNG: name kept.png instead of kept.JPG"])
    assert everything(place) == before


@pytest.mark.parametrize("command", FOLDERS.values(), ids=FOLDERS)
def test_folders_that_cannot_be_written(refused, place, monkeypatch, command):
    monkeypatch.chdir(place)
    before = everything(place)
    for name in ("file", "link", "dangling", "fifo", "file/x/y", "/dev/null"):
        refused(*command, name, words=["name a folder"])
    refused(*command, f"new/{'x' * 300}/y", words=["too long", "shorter"])
    if os.path.exists("/proc/self"):
        refused(*command, "/proc/x/y", words=["/proc"])
    assert everything(place) == before


@pytest.mark.parametrize("command, name", [("build", "config.json"), ("merge", "README.md"), ("demo", "kept.png"),
                                           ("horizon", "horizon.png"), ("bench", "report.html")])  # fmt: skip
def test_files_of_a_folder_that_cannot_be_replaced(refused, place, monkeypatch, command, name):
    monkeypatch.chdir(place)
    (place / "folder" / name).symlink_to(place / "file")
    refused(*FOLDERS[command], "folder", words=[name, "not a regular file"])
    assert (place / "file").read_text() == "kept"


@pytest.mark.parametrize("command, name", [("show", IMAGE), ("prune --show", IMAGE), ("explain", IMAGE),
                                           ("prune --input", "in.jsonl"), ("prune --tokens", "in.safetensors"),
                                           ("prune --input", "./images/../in.jsonl")])  # fmt: skip
def test_an_input_is_not_replaced(refused, place, monkeypatch, command, name):
    monkeypatch.chdir(place)
    for new in ("in.jsonl", "in.safetensors"):
        Path(new).write_text("kept")
    before = everything(place)
    refused(*FILES[command], name, words=["is an input"])
    assert everything(place) == before


def test_one_of_several_pictures_to_draw(refused, place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "kept-2.png").mkdir()
    refused("prune", "miniature", "--image", IMAGE, "--image", IMAGE, "--ask", "?", "--show", "kept.png",
            words=["kept-2.png is a folder"])  # fmt: skip


CALIBRATE = {"calibrate": ["calibrate", "miniature", "--data", "miniature", "--keep", "0.2", "--out"]}
WITHOUT_DEVICE = {"inspect", "prune --tokens", "merge", "demo", "images"}
WITH_DEVICE = {k: v for k, v in (FILES | FOLDERS | CALIBRATE).items() if k not in WITHOUT_DEVICE}


@pytest.mark.parametrize("command", WITH_DEVICE.values(), ids=WITH_DEVICE)
def test_a_device_that_is_not_there(refused, place, monkeypatch, command):
    monkeypatch.chdir(place)
    before = everything(place)
    refused(*command, "new.json", "--device", "cuda:77", words=["cannot use the device 'cuda:77'", "cpu"])
    assert everything(place) == before


@pytest.mark.parametrize("name", ["foo", "cuda:77", "cuda:-1", "meta", "CPU", "cpu:9", "cpu ", "c\nuda"])
def test_no_such_device(name):
    with pytest.raises(CodebookError, match=r"cannot use the device .*; use cpu") as caught:
        check_device(name)
    assert "\n" not in str(caught.value)


def test_devices_that_are_there():
    assert check_device(None) in ("cpu", "cuda")
    check_device("cpu")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_read_only_disk_is_called_that(refused, place, monkeypatch):
    monkeypatch.chdir(place)
    disk = place / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        for command in (FILES["show"], FOLDERS["build"]):
            refused(*command, disk / "x", words=["Read-only file system", "another folder"])
            with pytest.raises(AssertionError):
                refused(*command, disk / "x", words=["free space"])
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it")
def test_a_picture_for_which_there_is_no_space_is_named(tmp_path, monkeypatch):
    picture = Image.new("RGB", (8, 8))
    monkeypatch.setattr(picture, "save", lambda *_, **__: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(CodebookError, match=r"cannot write .*new\.png: No space left .*; free space"):
        write_picture(picture, tmp_path / "new.png")
    assert not list(tmp_path.iterdir())


def test_what_is_accepted(place):
    check_output_file(place / "new")
    check_output_file(place / "file", [place / "images"])
    check_output_folder(place / "new" / "deep" / "er")
    check_output_folder(place / "folder", ["config.json"])
    (place / "to-folder").symlink_to("folder")
    check_output_folder(place / "to-folder")
    assert not (place / "new").exists()


@pytest.mark.parametrize("command", [
    ["prune", "miniature", "--image", IMAGE, "--ask", "?", "--codebook", "folder"],
    ["prune", "miniature", "--input", "in.jsonl", "--output", "new", "--codebook", "folder"],
    ["show", "miniature", "--image", IMAGE, "--ask", "?", "--methods", "codebook", "--codebook", "folder"],
    ["explain", "miniature", "--image", IMAGE, "--patch", "1,1", "--codebook", "folder"],
    ["bench", "miniature", "--methods", "codebook", "--out", "new", "--codebook", "folder"],
    ["calibrate", "miniature", "--data", "miniature", "--keep", "0.2", "--out", "new.json", "--codebook", "folder"],
])  # fmt: skip
def test_a_folder_without_a_codebook(refused, place, monkeypatch, command):
    monkeypatch.chdir(place)
    before = everything(place)
    refused(*command, words=["no codebook in folder", "codebook build"])
    assert everything(place) == before


@pytest.mark.parametrize("command, words", [
    (["calibrate", "miniature", "--data", "miniature", "--keep", ".2", "--count", "1", "--out", "a.json"], ["give 18"]),
    (["miniature", "evaluate", "--look", "odd"], ["'odd'", "plain"]),
    (["horizon", "miniature", "--data", "miniature", "--split", "odd"], ["'odd'", "train"]),
    (["bench", "miniature", "--methods", "uniform", "--out", "new", "--data", "miniature:odd"], ["'odd'"]),
    (["bench", "miniature", "--methods", "uniform", "--out", "new", "--horizon", "odd.json"], ["odd.json"]),
    (["build", "miniature", "--images", "images", "--out", "new", "--dtype", "odd"], ["'odd'", "bfloat16"]),
    (["build", "miniature", "--images", "images", "--out", "new", "--engine", "odd"], ["'odd'", "ray"]),
    (["build", "miniature", "--images", "images", "--out", "new", "--workers", "3"], ["add --engine ray"]),
    (["extend", BOOK, "--images", "images", "--out", "new", "--address", "a:1"], ["add --engine ray"]),
    (["build", "miniature", "--images", "images", "--out", "new", "--tau-p", "nan"], ["tau_p", "nan"]),
    (["build", "miniature", "--images", "images", "--out", "new", "--prompt", ""], ["the prompt is empty"]),
    (["tune", "miniature", "--images", "images", "--out", "new", "--prompt", " "], ["the prompt is empty"]),
    (["show", "miniature", "--image", IMAGE, "--ask", "", "--methods", "uniform", "--out", "new.png"], ["is empty"]),
    (["build", "miniature", "--images", "images", "--out", "images"], ["images is not empty and holds no build"]),
])  # fmt: skip
def test_options_that_make_no_sense(refused, place, monkeypatch, command, words):
    monkeypatch.chdir(place)
    before = everything(place)
    refused(*command, words=words)
    assert everything(place) == before


@pytest.mark.parametrize("command", (FILES | FOLDERS).values(), ids=FILES | FOLDERS)
def test_an_empty_path_is_not_the_folder_that_we_are_in(refused, place, monkeypatch, command):
    monkeypatch.chdir(place)
    before = everything(place)
    refused(*command, "", words=[command[-1], "the path is empty"])
    assert everything(place) == before


@pytest.mark.parametrize("command, words", [
    (["build", "miniature", "--out", "new", "--images", ""], ["the path is empty"]),
    (["inspect", ""], ["the path is empty"]),
    (["prune", "miniature", "--ask", "?", "--image", ""], ["the path is empty"]),
    (["prune", "", "--ask", "?", "--image", IMAGE], ["the model's name is empty"]),
    (["check", ""], ["the model's name is empty"]),
    (["serve", "--port", "0", "--codebook", ""], ["'' names no folder"]),
    (["serve", "--port", "0", "--codebook", "a="], ["'a=' names no folder"]),
])  # fmt: skip
def test_an_empty_input_is_none(refused, place, monkeypatch, command, words):
    monkeypatch.chdir(place)
    refused(*command, words=words)


@pytest.mark.parametrize("command", ["build", "extend"])
def test_without_ray(refused, place, monkeypatch, command):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(*FOLDERS[command], "new", "--engine", "ray", words=["ray is not installed"])
