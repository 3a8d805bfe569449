import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import time

import numpy
import pytest
import torch
from PIL import Image
from sqlitedict import SqliteDict

from codebook.building import STEPS, build
from codebook.errors import CodebookError
from codebook.store.codebook import Codebook
from codebook.store.journal import Journal
from tests.building.folders import contents, interrupt, run
from tests.building.tiny import build_tiny, model, processor, settings
from tests.journals import read_journal


@pytest.fixture(scope="module")
def whole(tiny, pictures, tmp_path_factory):
    """The codebook of an uninterrupted build."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(tiny, pictures, out)
    return contents(out)


@pytest.fixture
def some(pictures, tmp_path):
    """A copy of the pictures, to spoil."""
    return pathlib.Path(shutil.copytree(pictures, tmp_path / "some"))


def test_build(tiny, pictures, tmp_path):
    states = []
    book = run(tiny, pictures, tmp_path / "out", progress=states.append)
    assert [s.done for s in states] == [*range(9), 8] and {s.total for s in states} == {8}
    funnel = states[-1].funnel
    assert tuple(funnel) == STEPS and book.config["funnel"] == funnel
    counts = list(funnel.values())
    assert counts == sorted(set(counts), reverse=True), "each step drops some"
    assert len(book) == funnel["recurrent"] == len(Codebook.load(tmp_path / "out"))
    assert sorted(contents(tmp_path / "out")) == [
        "README.md", "config.json", "images.jsonl", "prototypes.safetensors", "provenance.jsonl",
        "survivors.safetensors",
    ]  # fmt: skip
    # each prototype is the projector output at the place its provenance names
    from codebook.models import family

    model, processor = tiny
    row = book.provenance[-1]
    with Image.open(pictures / row["image"]) as image, torch.inference_mode():
        pixels = processor.image_processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        tokens = family(model).image_features(model, pixels)[0][0]
    assert torch.equal(book.prototypes[-1], tokens[row["row"] * 6 + row["col"]])
    spreads = [json.loads(line)["spread"] for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    last = sorted(p for p in pictures.rglob("*") if p.is_file())[-1]
    with Image.open(last) as image, torch.inference_mode():
        pixels = processor.image_processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        tokens = family(model).image_features(model, pixels)[0][0].double().numpy()
    unit, mean = tokens / numpy.linalg.norm(tokens, axis=1, keepdims=True), tokens.mean(0)
    assert spreads[-1] == pytest.approx(numpy.std(unit @ (mean / numpy.linalg.norm(mean))), abs=1e-5)
    assert book.spread == book.config["spread"] == pytest.approx(numpy.mean(spreads), abs=1e-6)
    clusters = {
        r["cluster"]: {q["image"] for q in book.provenance if q["cluster"] == r["cluster"]} for r in book.provenance
    }
    assert all(len(images) > 4 for images in clusters.values())  # more than half of 8


def test_again_returns_it_without_work(tiny, pictures, tmp_path, whole):
    out = tmp_path / "out"
    run(tiny, pictures, out)
    (out / ".build").mkdir()  # as left by a kill while cleaning up
    states = []
    book = run(tiny, pictures, out, progress=states.append)
    assert [(s.done, s.resumed) for s in states] == [(8, 8)] and len(book)
    assert contents(out) == whole


def test_batch_size_changes_no_prototype(tiny, pictures, tmp_path):
    books = [run(tiny, pictures, tmp_path / str(b), batch_size=b, limit=3) for b in (1, 5)]
    assert torch.equal(books[0].prototypes, books[1].prototypes)


def test_a_list_of_images_is_the_same_as_their_folder(tiny, pictures, tmp_path, whole):
    files = [p for p in pictures.rglob("*") if p.is_file()]
    run(tiny, files[::-1], tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_interrupted_at_every_write(tiny, pictures, tmp_path, whole, monkeypatch):
    """Stop before each fsync, rename and commit in turn, resume every time: the same bytes, and no half codebook."""
    real_fsync, real_replace, real_commit = os.fsync, pathlib.Path.replace, SqliteDict.commit
    fuse = [0]

    def burning(real):
        def call(*args, **kwargs):
            fuse[0] -= 1
            if fuse[0] == 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", burning(real_fsync))
    monkeypatch.setattr(pathlib.Path, "replace", burning(real_replace))
    monkeypatch.setattr(SqliteDict, "commit", burning(real_commit))
    out, last = tmp_path / "out", 0
    for attempt in range(200):
        # while there are images, two to four calls get through a run; then the last step is stopped at each in turn
        images = len(list((out / ".build" / "journal.parts").glob("*.safetensors")))
        last += images == 8
        fuse[0] = last or 3 + attempt % 3
        try:
            run(tiny, pictures, out)
            break
        except KeyboardInterrupt:
            fuse[0] = 0
            if (out / "config.json").exists():
                assert contents(out).items() >= whole.items()
    assert last == 14  # six files, each synced and renamed, their folder synced, then through
    assert contents(out) == whole


def test_ten_kills_at_random_moments(pictures, tmp_path, whole):
    """kill -9 anywhere in a build, resume, kill again: in the end the same bytes, and never a half codebook."""
    processes = multiprocessing.get_context("forkserver")  # imports torch once, not once a kill
    processes.set_forkserver_preload(["codebook.building", "tests.building.tiny"])

    def start(out):
        here, there = processes.Pipe(duplex=False)
        process = processes.Process(target=build_tiny, args=(pictures, out, there.send))
        process.start()
        there.close()
        return process, here

    def finish(out):
        process, here = start(out)
        assert here.recv() >= 0
        begun = time.monotonic()
        process.join()
        assert process.exitcode == 0 and contents(out) == whole
        return time.monotonic() - begun

    length, random, kills = finish(tmp_path / "straight"), numpy.random.default_rng(0), 0
    for round_ in range(100):
        out = tmp_path / str(round_)
        for _ in range(5):
            process, here = start(out)
            here.recv()
            time.sleep(random.uniform(0, 0.7 * length))
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            assert not (out / "config.json").exists() or contents(out).items() >= whole.items()
        finish(out)
        if kills >= 10:
            return
    raise AssertionError("the kills came too late")


def test_truncated_image_is_skipped_and_named(tiny, some, tmp_path):
    spoilt = some / "3.jpg"
    spoilt.write_bytes(spoilt.read_bytes()[:-200])
    (some / "5.jpg").write_bytes(b"no picture")
    states = []
    book = run(tiny, some, tmp_path / "out", progress=states.append)
    assert book.config["images"] == {"used": 6, "skipped": ["3.jpg", "5.jpg"]}
    assert states[-1].done == 8 and states[-1].skipped == ("3.jpg", "5.jpg")


def test_strict_stops_and_resumes_with_the_image_mended(tiny, some, tmp_path, whole):
    spoilt = some / "3.jpg"
    good = spoilt.read_bytes()
    spoilt.write_bytes(good[:-200])
    with pytest.raises(CodebookError, match=r"3\.jpg: .*finished images are kept"):
        run(tiny, some, tmp_path / "out", strict=True)
    spoilt.write_bytes(good)
    states = []
    run(tiny, some, tmp_path / "out", strict=True, progress=states.append)
    assert states[0].resumed == 2
    assert contents(tmp_path / "out") == whole


def test_a_model_in_training_mode(pictures, tmp_path):
    """Its tokens differ from run to run."""
    learning = model()
    learning.model.vision_tower.encoder.layers[0].self_attn.dropout = 0.1
    learning.train()
    with pytest.raises(CodebookError, match=r"in training mode, in which .*self_attn changes .*: call model.eval\(\)"):
        run((learning, processor()), pictures, tmp_path / "book")


def test_no_readable_image(tiny, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    with pytest.raises(CodebookError, match=r"no image can be read: a\.png \(not an image\); give"):
        run(tiny, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_images(tiny, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("")
    with pytest.raises(CodebookError, match="no image in"):
        run(tiny, tmp_path / "in", tmp_path / "out")
    with pytest.raises(CodebookError, match="no such folder"):
        run(tiny, tmp_path / "none", tmp_path / "out")
    with pytest.raises(CodebookError, match="no such image"):
        run(tiny, [tmp_path / "none.png"], tmp_path / "out")
    with pytest.raises(CodebookError, match="no image"):
        run(tiny, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"tau_p": 1e-6}, "P1 0, JSD 0, recurrent 0.*raise tau_p"),
        ({"tau_j": 1e-12}, "JSD 0, recurrent 0.*raise tau_j"),
        ({"max_cluster_size": 1, "clusters_per_image": 1}, "isolated 0, P1 0.*raise max_cluster_size"),
        ({"min_image_fraction": 0.99, "clusters": 100}, "recurrent 0.*lower min_image_fraction"),
    ],
)
def test_no_prototype_left(tiny, pictures, tmp_path, changes, remedy):
    with pytest.raises(CodebookError, match=r"no prototype left \(probed 72.*" + remedy):
        run(tiny, pictures, tmp_path / "out", settings=settings(**changes), limit=2)
    assert not (tmp_path / "out" / "config.json").exists()
    if "min_image_fraction" in changes:  # only the last step is repeated
        states = []
        run(tiny, pictures, tmp_path / "out", limit=2, progress=states.append)
        assert states[0].resumed == 2
    else:
        assert not (tmp_path / "out").exists()


def test_out_of_another_build(tiny, pictures, some, tmp_path):
    out = tmp_path / "out"
    run(tiny, pictures, out, limit=2)
    with pytest.raises(CodebookError, match=r"another build's codebook \(another tau_p\)"):
        run(tiny, pictures, out, limit=2, settings=settings(tau_p=0.3))
    with pytest.raises(CodebookError, match="another images_sha256"):
        run(tiny, pictures, out, limit=3)
    before = contents(out)
    with pytest.raises(CodebookError, match="another model"):
        build(*tiny, pictures, out, model_id="other", settings=settings(), limit=2)
    assert contents(out) == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    with pytest.raises(CodebookError, match="not empty and holds no build"):
        run(tiny, pictures, foreign)
    (foreign / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(CodebookError, match="something else than a build"):
        run(tiny, pictures, foreign)
    assert len(contents(foreign)) == 2
    with pytest.raises(CodebookError, match="is a file"):
        run(tiny, pictures, foreign / "thesis.tex")


def test_another_build_that_ends_meanwhile_is_not_replaced(tiny, pictures, tmp_path):
    """One begins with a pilot's journal and one with the images', so both can be under way."""

    def other(state):
        if state.done == 2 and not (tmp_path / "out" / "config.json").exists():
            shutil.copytree(tmp_path / "other", tmp_path / "out", dirs_exist_ok=True)

    run(tiny, pictures, tmp_path / "other", settings=settings(tau_p=0.3))
    with pytest.raises(CodebookError, match=r"holds another build's codebook \(another tau_p\)"):
        run(tiny, pictures, tmp_path / "out", progress=other)
    assert contents(tmp_path / "out").items() >= contents(tmp_path / "other").items()


def test_unfinished_of_another_build(tiny, pictures, tmp_path):
    out = tmp_path / "out"
    interrupt(tiny, pictures, out)
    with pytest.raises(CodebookError, match=r"is from a run with another tau_j: choose another --out, or delete it"):
        run(tiny, pictures, out, settings=settings(tau_j=0.3))
    (tmp_path / "in").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "in" / "x.png")
    with pytest.raises(CodebookError, match="unfinished build of other images"):
        run(tiny, tmp_path / "in", out)


@torch.no_grad()
def test_another_language_model_behind_the_same_tower(tiny, pictures, tmp_path):
    """Its answers choose other tokens: a codebook of both would be neither's."""
    whole, begun, other = tmp_path / "whole", tmp_path / "begun", model()
    for weight in other.get_decoder().parameters():
        weight.mul_(1.5)
    run(tiny, pictures, whole, limit=2)
    interrupt(tiny, pictures, begun)
    with pytest.raises(CodebookError, match=r"another build's codebook \(another language_model\): choose"):
        run((other, tiny[1]), pictures, whole, limit=2)
    with pytest.raises(CodebookError, match=r"is from a run with another language_model: choose another --out"):
        run((other, tiny[1]), pictures, begun)
    run(tiny, pictures, begun)


def test_two_at_once(tiny, pictures, tmp_path):
    interrupt(tiny, pictures, tmp_path)
    file = tmp_path / ".build" / "journal.sqlite"
    about, _ = read_journal(file)
    with Journal(file, about), pytest.raises(CodebookError, match=r"another run is writing .*: wait for it, or choose"):
        run(tiny, pictures, tmp_path)
    run(tiny, pictures, tmp_path)


def test_damaged_journal(tiny, pictures, tmp_path):
    interrupt(tiny, pictures, tmp_path)
    (tmp_path / ".build" / "journal.sqlite").write_bytes(b"garbage " * 1000)
    with pytest.raises(CodebookError, match="no journal, or damaged: choose another --out, or delete it"):
        run(tiny, pictures, tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("key.json", "{}", r"of an earlier version: delete .*\.build and run again"),
        ("journal.jsonl", '{"about": {}}\n', r"of an earlier version: choose another --out, or delete it"),
    ],
)
def test_journal_of_an_earlier_version(tiny, pictures, tmp_path, name, text, error):
    (tmp_path / ".build").mkdir()
    (tmp_path / ".build" / name).write_text(text)
    with pytest.raises(CodebookError, match=error):
        run(tiny, pictures, tmp_path)
    assert (tmp_path / ".build" / name).read_text() == text


def test_damaged_part(tiny, pictures, tmp_path):
    interrupt(tiny, pictures, tmp_path)
    for path in (tmp_path / ".build" / "journal.parts").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CodebookError, match=r"safetensors is damaged.*delete it"):
        run(tiny, pictures, tmp_path)


def test_full_disk_for_files(tiny, pictures, tmp_path, whole):
    """A file size limit stands in for a full disk: the system refuses the bytes at the same place."""
    out = tmp_path / "out"
    interrupt(tiny, pictures, out, at=8)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(CodebookError, match="cannot write"):
            run(tiny, pictures, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not [name for name in contents(out) if not name.startswith(".build")]
    run(tiny, pictures, out)
    assert contents(out) == whole


def test_out_that_cannot_be_made(tiny, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CodebookError, match="cannot write"):
        run(tiny, pictures, tmp_path / "file" / "out", limit=1)


def test_a_changed_image_is_probed_again(tiny, some, tmp_path):
    interrupt(tiny, some, tmp_path / "out", at=6)
    Image.new("RGB", (24, 24), "red").save(some / "1.jpg")
    run(tiny, some, tmp_path / "out")
    run(tiny, some, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
