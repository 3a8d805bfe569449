"""Clips as people have them: which frames are shown, known by their colour, and what is refused by name."""

import json
import struct
import types

import numpy as np
import pytest

from codebook.errors import CodebookError
from codebook.inference.frames import frame_rule
from codebook.inference.samples import read_samples
from codebook.models.registry import FAMILIES
from codebook.store import clips
from codebook.store.clips import ClipInfo
from codebook.store.pictures import even_frames, read_video
from tests.store.films import KINDS, clip

av = pytest.importorskip("av")


def numbers(pictures):
    """Which frames these are."""
    return [round(float(np.asarray(picture).mean()) / 8) for picture in pictures]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [1, 12, 100])
def test_chosen_frames_are_those(tmp_path, kind, gap):
    """Whatever the distance of keyframes, and whether decoding goes on or jumps."""
    path = clip(tmp_path / f"a.{kind}", gap=gap)
    said = []

    def rule(info):
        said.append(info)
        return [29, 0, 1, 15, 15]

    found = read_video(path, rule)
    assert numbers(found) == [0, 1, 15, 29] and {picture.size for picture in found} == {(64, 48)}
    assert said == [ClipInfo(30, 10.0, 64, 48)] and said[0].duration == 3
    assert numbers(read_video(path)) == [1, 5, 9, 13, 16, 20, 24, 28]  # middles of eight parts of 3.75 frames


def test_frames_are_found_by_their_time(tmp_path):
    """A clip that stands still for a second: its frames are of different lengths."""
    path = clip(tmp_path / "a.webm", count=4, times=[0, 2, 12, 14])
    assert numbers(read_video(path, lambda info: [0, 3, 8, 13])) == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [((1, 0, 0, 1), "top left"), ((0, 1, -1, 0), "top right"), ((-1, 0, 0, -1), "bottom right"),
     ((0, -1, 1, 0), "bottom left")],
)  # fmt: skip
def test_a_clip_is_turned_as_phones_say(tmp_path, matrix, corner):
    """By the matrix (a, b, c, d) of its track: x' = a x + c y, y' = b x + d y. What was top left is bright."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:16, :16] = 255
    path = clip(tmp_path / "a.mp4", count=3, picture=picture)
    data, (a, b, c, d) = path.read_bytes(), (2**16 * value for value in matrix)
    start = data.index(b"tkhd") + 44  # version and flags, five numbers, and what precedes the matrix
    assert data[start : start + 36] == struct.pack(">9i", 2**16, 0, 0, 0, 2**16, 0, 0, 0, 2**30)
    path.write_bytes(data[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30) + data[start + 36 :])
    [frame, *_] = read_video(path)
    assert frame.size == ((64, 48) if b == 0 else (48, 64))
    row, col = (-5 if word in ("bottom", "right") else 4 for word in corner.split())
    assert np.asarray(frame)[row, col].min() > 200 and np.asarray(frame).mean() < 60


def test_few_frames_of_a_long_clip_are_decoded(tmp_path, monkeypatch):
    path = clip(tmp_path / "a.mp4", count=300, fps=10, size=(16, 16), gap=10)
    monkeypatch.setattr(clips, "MOST_DECODED", 40)  # 3 jumps of at most 10 frames and the one after
    assert len(read_video(path, lambda info: [0, 100, 299])) == 3
    with pytest.raises(CodebookError, match=r"more than 40 frames must be decoded.*keyframes"):
        read_video(path, lambda info: range(300))
    monkeypatch.setattr(clips, "MOST_FRAMES", 3)
    monkeypatch.setattr(clips, "MOST_DECODED", 300)
    assert len(read_video(path, lambda info: range(300))) == 3


def test_damage_is_refused_by_name(tmp_path):
    path = clip(tmp_path / "a.mp4")
    whole = path.read_bytes()
    for name, data, says in (
        ("cut.mp4", whole[: len(whole) // 2], "cannot read video .*cut.mp4"),
        ("head.mp4", whole[:40], "cannot read video .*head.mp4"),
        ("text.mp4", b"no video at all, but a text", "not an image; give an mp4"),
        ("list.mp4", b"#EXTM3U\nfile:///etc/passwd\n", "not an image; give an mp4"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CodebookError, match=says):
            read_video(tmp_path / name)
    half = clip(tmp_path / "b.webm", count=60)
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    with pytest.raises(CodebookError, match=r"b\.webm"):
        read_video(half, lambda info: [0, 59])
    with pytest.raises(CodebookError, match="no such video"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(CodebookError, match="one side may be"):
        read_video(clip(tmp_path / "thin.mp4", count=2, size=(16, 16 * 250)))
    tail = np.frombuffer(whole, np.uint8).copy()
    tail[200:-1500:3] ^= 0x5A  # in the pictures' own data
    (tmp_path / "spoilt.mp4").write_bytes(tail.tobytes())
    with pytest.raises(CodebookError, match=r"spoilt\.mp4"):
        read_video(tmp_path / "spoilt.mp4")


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    path = clip(tmp_path / "a.mp4", count=2)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(CodebookError, match=r"a video, which needs PyAV: pip install 'redundancy-codebook\[video\]'"):
        read_video(path)


def test_each_family_samples_as_its_processor():
    """Worked by hand from transformers' own processors: 3 seconds at 10 frames per second."""
    short, hour = ClipInfo(30, 10.0, 64, 48), ClipInfo(90_000, 25.0, 64, 48)
    none = types.SimpleNamespace()
    assert frame_rule(FAMILIES["llava_onevision"], none) is even_frames
    qwen = frame_rule(FAMILIES["qwen2_5_vl"], none)
    assert list(qwen(short)) == [0, 5, 10, 15, 20, 25]  # 2 per second, an even number
    assert len(qwen(hour)) == clips.MOST_FRAMES and list(qwen(ClipInfo(3, 10.0, 1, 1))) == [0, 1]
    third = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl").Qwen3VLVideoProcessor()
    rule = frame_rule(FAMILIES["qwen3_vl"], types.SimpleNamespace(video_processor=third))
    assert list(rule(short)) == [0, 6, 12, 17, 23, 29]  # linspace(0, 29, 6), rounded
    fixed = types.SimpleNamespace(num_frames=8, fps=None, sample_frames=third.sample_frames)
    fixed.sample_frames = lambda metadata: (_ for _ in ()).throw(ValueError("exceeds"))
    few = frame_rule(FAMILIES["internvl"], types.SimpleNamespace(video_processor=fixed))
    assert list(few(ClipInfo(3, 10.0, 1, 1))) == [0, 1, 2]


def test_the_command_line_shows_clips(run, refused, tmp_path):
    path = clip(tmp_path / "a.mp4", size=(96, 96))
    asked = ["prune", "miniature", "--video", path, "--ask", "describe.", "--keep", "0.2"]
    code, out, _ = run(*asked, "--json", "--show", tmp_path / "kept.png")
    report = json.loads(out)
    assert code == 0 and [len(kept) for kept in report["kept"]] == [28] * 8
    assert (tmp_path / "kept.png").is_file() and (tmp_path / "kept-8.png").is_file()
    (tmp_path / "films.jsonl").write_text(json.dumps({"video": "a.mp4", "question": "describe.", "answer": "x"}))
    assert numbers(read_samples(tmp_path / "films.jsonl")[0].images) == [1, 5, 9, 13, 16, 20, 24, 28]
    refused(*asked, "--input", path, words=["--video does not go with --input"])
    refused("prune", "miniature", "--ask", "describe.", words=["--video FILE"])
