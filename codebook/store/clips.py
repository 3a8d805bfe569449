"""Clips: mp4 and webm files, of which only the frames that are shown are decoded, by PyAV.

A clip is read by the demuxer of its own container and no other: playlists, which name further files and addresses, are
refused unread. Frames are found by their time, so that clips of a varying frame rate are sampled evenly, too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image as Picture

from codebook.errors import CodebookError, install_command
from codebook.store.reading import cannot_read, open_regular

CONTAINERS = ((4, b"ftyp", "mov"), (0, b"\x1a\x45\xdf\xa3", "matroska"))
"""What files of each container begin with, at which byte, and FFmpeg's name of its demuxer."""
LARGEST_CLIP = 2**32
"""Bytes of a clip's file; it is read in pieces."""
MOST_FRAMES = 128
"""Most frames of a clip that are shown."""
MOST_DECODED = 20_000
"""Most frames that are decoded to find those that are shown: ten minutes at 30 per second without a single keyframe."""
AHEAD = 2.0
"""Seconds up to which decoding on is preferred to a jump back to the keyframe before a frame."""
WHOLE_CLIP = "use a whole mp4 or webm file"


@dataclass(frozen=True)
class ClipInfo:
    """What a clip says of itself before it is decoded: its number of frames, frames per second, and their size."""

    frames: int
    fps: float
    width: int
    height: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.fps


FrameRule = Callable[[ClipInfo], Sequence[int]]
"""Chooses which frames of a clip are shown: their numbers, ascending, from 0 to `frames - 1`."""


def within(rule: FrameRule, start: float, end: float | None) -> FrameRule:
    """A rule that chooses among the frames of a part of the clip, seconds `start` to `end` (None: the clip's end)."""

    def choose(clip: ClipInfo) -> list[int]:
        first = min(max(0, int(start * clip.fps)), clip.frames - 1)
        last = clip.frames if end is None else min(clip.frames, max(first + 1, int(end * clip.fps) + 1))
        return [first + number for number in rule(replace(clip, frames=last - first))]

    return choose


def container_of(head: bytes) -> str | None:
    """FFmpeg's name of the container that a file with these first bytes is in, if it is one that is read."""
    return next((name for at, mark, name in CONTAINERS if head[at : at + len(mark)] == mark), None)


def read_clip(path: Path, rule: FrameRule, check: Callable[[int, int], None]) -> tuple[Picture.Image, ...]:
    """The frames that a rule chooses, as RGB and upright.

    Parameters
    ----------
    check
        Called with the width and height of the frames before one is decoded; raises a ValueError if they are too large.

    Raises
    ------
    CodebookError
        If PyAV is missing; if the file is missing, damaged, broken off, no clip, or beyond the limits of
        docs/security.md.
    """
    try:
        import av
    except ImportError:
        raise CodebookError(f"{path} is a video, which needs PyAV: {install_command('video')}") from None
    try:
        with _opened(av, path) as (container, stream):
            info = _info(container, stream)
            check(info.width, info.height)
            numbers = sorted({int(number) for number in rule(info)})
            if len(numbers) > MOST_FRAMES:  # as many, at even distances
                numbers = [numbers[i * len(numbers) // MOST_FRAMES] for i in range(MOST_FRAMES)]
            return tuple(_frames(container, stream, [number / info.fps for number in numbers], 1 / info.fps, check))
    except FileNotFoundError:
        raise CodebookError(f"no such video: {path}") from None
    except CodebookError:
        raise
    except Exception as error:  # FFmpeg's errors are of a dozen types
        raise cannot_read(f"video {path}", error, WHOLE_CLIP) from None


@contextlib.contextmanager
def _opened(av: Any, path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream."""
    with os.fdopen(open_regular(path, LARGEST_CLIP), "rb") as file:
        kind = container_of(file.read(16))
        if kind is None:
            raise ValueError("neither mp4 nor webm")
        file.seek(0)
        with av.open(file, format=kind) as container:
            if not container.streams.video:
                raise ValueError("it holds no pictures")
            yield container, container.streams.video[0]


def _info(container: Any, stream: Any) -> ClipInfo:
    frames, rate = stream.frames, float(stream.average_rate or stream.guessed_rate or 0)
    if not frames and rate and container.duration:
        frames = round(container.duration / 1e6 * rate)
    if not frames or not rate:  # as browsers record: nothing stands in front, so its packets are counted
        times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
        container.seek(0)
        frames = len(times)
        span = float((max(times) - min(times)) * stream.time_base) if times else 0
        rate = rate or ((frames - 1) / span if span else 1)
    if not frames:
        raise ValueError("it holds no frames")
    return ClipInfo(frames, rate, stream.codec_context.width, stream.codec_context.height)


def _frames(
    container: Any, stream: Any, times: Sequence[float], step: float, check: Callable[[int, int], None]
) -> Iterator[Picture.Image]:
    """The frame that is shown at each of these seconds, ascending; a frame lasts until the next one, `step` seconds."""
    begin = float((stream.start_time or 0) * stream.time_base)
    decoded, now = 0, 0.0
    latest = held = None  # the frame that is shown now, and the one after it
    following: Iterator[Any] = iter(())
    for time in times:
        if latest is None or time - now > AHEAD:
            container.seek(int((begin + time) / stream.time_base), stream=stream)
            following, latest, held = container.decode(stream), None, None
        while (held := held or next(following, None)) is not None:
            start = now + step if held.time is None else held.time - begin
            if latest is not None and start > time + step / 2:
                break
            decoded += 1
            if decoded > MOST_DECODED:
                raise ValueError(f"more than {MOST_DECODED:,} frames must be decoded to sample it: give it keyframes")
            if held.is_corrupt:
                raise ValueError("a frame of it is damaged")
            latest, now, held = held, start, None
        if latest is None or now < time - max(AHEAD, 2 * step):
            raise ValueError(f"it breaks off before second {time:.1f}")
        check(latest.width, latest.height)
        yield latest.to_image().rotate(latest.rotation, expand=True)
