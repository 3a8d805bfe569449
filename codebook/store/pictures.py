"""Pictures and videos as they are read from disk: everywhere in the package by this one module.

A picture is shown to a model as a person sees it: upright, its transparent parts over white, its grey levels on their
own scale. Where the file is broken or too large it is refused, never shown in part.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture
from PIL import ImageOps, ImageSequence

from codebook.errors import CodebookError, one_line
from codebook.store.clips import LARGEST_CLIP, ClipInfo, FrameRule, container_of, read_clip
from codebook.store.reading import cannot_read, is_file, is_folder, open_regular, read_bytes

USE_WHOLE = "use a whole PNG, JPEG or WebP file"
SHOWN_AS_VIDEO = "give an mp4 or webm file, a folder of frames, or an animated GIF, PNG or WebP"
VIDEO_FRAMES = 8
"""How many frames of a video are shown to the model, where its processor has no rule of its own."""
LARGEST_PICTURE = 2**28
"""Bytes of a picture's file."""
MOST_PIXELS = 89_478_485
"""Pixels of a picture: a quarter of a gibibyte as RGB, the limit at which PIL begins to warn."""
LONGEST_SHAPE = 200
"""Longer side over shorter side: a processor that scales the shorter side up would fill the memory with the longer."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000")
"""What may be decoded, in PIL's names, where PIL has the decoder. EPS is not among them: decoding it runs a program."""
ORIENTATION = 0x0112
"""Tag of EXIF."""
BITS, WHITE_OR_BLACK, LEVEL_KIND = 258, 262, 339
"""Tags of TIFF: bits per level; 0 if its level 0 is white; 1, which is the default, if its levels have no sign."""
HEAD = 32
"""Bytes of a file that tell its format."""


class _Beyond(ValueError):
    """What is wrong with a picture that is whole, and what to do: it is beyond the limits."""


def read_image(source: Path | str | bytes | Picture.Image, name: str | None = None) -> Picture.Image:
    """A picture as RGB, as a person sees it; the same wherever the package reads one.

    - turned as its EXIF orientation says;
    - transparent parts over white;
    - 16-bit grey scaled to 8 bits; wider integers and floats as `_grey` says;
    - of an animation the first frame;
    - CMYK and the like converted as PIL does, without colour profiles.

    Parameters
    ----------
    source
        A regular file, a file's contents, or a picture that is open; it stays open, and as it is.
    name
        What to call the picture in an error; default: the file's path.

    Raises
    ------
    CodebookError
        If it is missing, no picture, broken off, or beyond the limits of docs/security.md.
    """
    with _open_picture(source, name) as picture:
        return upright_rgb(picture)


def decode_image(data: bytes, most_pixels: int = MOST_PIXELS) -> Picture.Image:
    """Like `read_image`, of a file's contents; raises a ValueError that says only what is wrong with them."""
    with _open_bytes(data, most_pixels) as picture:
        return upright_rgb(picture)


def even_frames(clip: ClipInfo) -> list[int]:
    """The rule of models whose processor has none: `VIDEO_FRAMES` frames, the middles of as many equal parts."""
    return spaced(clip.frames)


def read_video(path: Path, rule: FrameRule = even_frames) -> tuple[Path | Picture.Image, ...]:
    """Frames of a video, in order: of an mp4 or webm file those that `rule` chooses.

    A folder of frames (in order of their names) and an animated picture say nothing of their time: of them always
    `VIDEO_FRAMES`, evenly spaced.
    """
    if is_folder(path):
        files = frame_files(path)
        if not files:
            raise CodebookError(f"{path} holds no frames: give a folder of pictures")
        return tuple(files[i] for i in spaced(len(files)))
    if is_clip(path):
        return read_clip(path, rule, partial(_check_pixels, most=MOST_PIXELS))
    with _open_picture(path, None, "video", SHOWN_AS_VIDEO) as picture:
        still = int(picture.info.get("default_image", False))  # in front of an animated PNG, for who cannot play it
        wanted = {still + frame for frame in spaced(getattr(picture, "n_frames", 1) - still)}
        return tuple(upright_rgb(frame) for i, frame in enumerate(ImageSequence.Iterator(picture)) if i in wanted)


def frame_files(folder: Path) -> list[Path]:
    """The files of a video that is a folder of frames, in order of their names."""
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def is_picture(head: bytes) -> bool:
    """Whether a file that begins with these bytes looks like a picture that `read_image` can decode."""
    if len(head) < HEAD:
        head = head.ljust(HEAD, b"\0")  # PIL's own checks expect some bytes
    if head[:1] == b"P" and not head[2:3].isspace():  # "P5 " begins a PPM file, and "Python" a text
        return False
    return any(accepts(head) for accepts in _accepted().values())


def is_clip(path: Path) -> bool:
    """Whether a path names a file that begins like an mp4 or webm clip."""
    return is_file(path) and container_of(_first_bytes(path)) is not None


def is_picture_file(path: Path) -> bool:
    """Whether a path names a file that begins like a picture of a format that is read."""
    return is_file(path) and is_picture(_first_bytes(path))


def _first_bytes(path: Path) -> bytes:
    with os.fdopen(open_regular(path, LARGEST_CLIP), "rb") as file:
        return file.read(HEAD)


def spaced(found: int, frames: int = VIDEO_FRAMES) -> list[int]:
    """The middles of so many equal parts of a row of frames, or all of them if there are fewer."""
    count = min(frames, found)
    return [(2 * i + 1) * found // (2 * count) for i in range(count)]


@contextlib.contextmanager
def _open_picture(
    source: Path | str | bytes | Picture.Image, name: str | None, kind: str = "image", remedy: str = USE_WHOLE
) -> Iterator[Picture.Image]:
    """Open a picture within the limits; whatever is wrong with it, then or while it is used, is a CodebookError."""
    name = name or (str(source) if isinstance(source, Path | str) else "that was given")
    try:
        if isinstance(source, Picture.Image):
            with _decoding():
                _check_pixels(*source.size, MOST_PIXELS)
                yield source
            return
        data = source if isinstance(source, bytes) else read_bytes(Path(source), LARGEST_PICTURE)
        with _open_bytes(data) as picture:
            yield picture
    except FileNotFoundError:
        raise CodebookError(f"no such {kind}: {name}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, _Beyond):
            raise CodebookError(f"cannot read {kind} {name}: {one_line(error)}") from None
        raise cannot_read(f"{kind} {name}", error, remedy) from None


@contextlib.contextmanager
def _open_bytes(data: bytes, most_pixels: int = MOST_PIXELS) -> Iterator[Picture.Image]:
    """Open a picture within the limits; whatever a decoder raises, then or while it is used, is a ValueError."""
    if not is_picture(data[:HEAD]):
        raise ValueError("not an image")
    with _decoding(), Picture.open(io.BytesIO(data), formats=list(_accepted())) as picture:
        _check_pixels(*picture.size, most_pixels)
        if picture.format == "PNG":
            _scale_key(picture, bits=data[24])
        yield picture


def _scale_key(picture: Picture.Image, bits: int) -> None:
    """Bring the transparent colour of a PNG file from its scale to that of PIL's levels, as PIL does not."""
    key = picture.info.get("transparency")
    if isinstance(key, int) and picture.mode == "L":
        picture.info["transparency"] = key * 255 // (2**bits - 1)
    elif isinstance(key, tuple) and bits == 16:
        picture.info["transparency"] = tuple(level >> 8 for level in key)


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """A context in which whatever a decoder raises is a ValueError, and what it warns of is not heard."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of sizes that are refused here, and of damaged metadata
            yield
    except Picture.UnidentifiedImageError:  # it names the object that held the bytes, which differs from run to run
        raise ValueError("not an image") from None
    except Picture.DecompressionBombError:
        raise _Beyond(f"too many pixels, and at most {MOST_PIXELS:,} are read: scale it down") from None
    except _Beyond:
        raise
    except Exception as error:  # damaged files make PIL's decoders raise nearly anything
        raise ValueError(one_line(error)) from None


def _check_pixels(width: int, height: int, most: int) -> None:
    if not width * height:
        raise _Beyond(f"{width} x {height} pixels, which show nothing: give another one")
    if width * height > most:
        raise _Beyond(f"{width} x {height} pixels, and at most {most:,} are read: scale it down")
    if max(width, height) > LONGEST_SHAPE * min(width, height):
        raise _Beyond(f"{width} x {height} pixels, and one side may be {LONGEST_SHAPE} times the other: cut it")


def upright_rgb(picture: Picture.Image) -> Picture.Image:
    """An open picture as `read_image` would give it, whatever its size; what it gave stays as it is."""
    picture.load()
    if picture.mode.startswith(("I", "F")):
        return _turned(_grey(picture)).convert("RGB")
    picture = _turned(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Picture.alpha_composite(Picture.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _turned(picture: Picture.Image) -> Picture.Image:
    """A loaded picture turned as its EXIF orientation says; where that cannot be read, as it is stored."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged metadata make PIL raise nearly anything
        return picture


def _grey(picture: Picture.Image) -> Picture.Image:
    """Grey levels of more than 8 bits on the scale of 8.

    What is white is not in the file where PIL gives 32-bit integers or floats. Integers up to 65535 are 16-bit levels.
    White among floats is the first of 1, 255 and 65535 that none exceeds. Beyond 65535 white is the largest level. PIL
    leaves it to us that TIFF files may have 12 bits, no sign in 32, or white for 0, and PNG files a transparent level.
    """
    tags = getattr(picture, "tag_v2", {})
    turned = 1
    with contextlib.suppress(Exception):  # as of damaged metadata
        turned = picture.getexif().get(ORIENTATION, 1)
    stored = np.asarray(picture)
    if tags and tags.get(LEVEL_KIND, (1,))[0] == 1:
        stored = stored.astype(np.uint32)
    levels = stored.astype(np.float64)
    if not np.isfinite(levels).all():
        raise ValueError("it holds levels that are no numbers")
    largest = float(levels.max(initial=0))
    whole = 4095.0 if tags.get(BITS) == (12,) else 65535.0
    scales = (1.0, 255.0, 65535.0) if picture.mode == "F" else (whole,)
    white = next((scale for scale in scales if largest <= scale), largest)
    shown = np.rint(levels.clip(0) * (255 / white)).astype(np.uint8)
    if tags.get(WHITE_OR_BLACK) == 0:
        shown = 255 - shown
    if (key := picture.info.get("transparency")) is not None:
        shown[stored == key] = 255
    grey = Picture.fromarray(shown, "L")
    grey.getexif()[ORIENTATION] = turned
    return grey


def _accepted() -> dict[str, Callable[[bytes], Any]]:
    """For each format that can be decoded here, the function that knows its first bytes."""
    Picture.init()
    known = {name: Picture.OPEN[name][1] for name in FORMATS if name in Picture.OPEN}
    return {name: accepts for name, accepts in known.items() if accepts is not None}
