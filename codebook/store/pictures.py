"""Pictures and videos as they are read from disk."""

from __future__ import annotations

from pathlib import Path

from PIL import Image as Picture
from PIL import ImageSequence

from codebook.errors import CodebookError

VIDEO_FRAMES = 8
"""How many frames of a video are shown to the model."""


def read_image(path: Path | str) -> Picture.Image:
    """Read a picture as RGB, or raise a CodebookError that says why it cannot be read."""
    try:
        with Picture.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise CodebookError(f"no such image: {path}") from None
    except (OSError, SyntaxError, ValueError, Picture.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "").strip(" '") or type(error).__name__
        raise CodebookError(f"cannot read image {path}: {reason}; use a whole PNG, JPEG or WebP file") from None


def read_video(path: Path, frames: int = VIDEO_FRAMES) -> tuple[Path | Picture.Image, ...]:
    """Up to `frames` frames, evenly spaced, of a folder of them (in order of their names) or an animated picture."""
    if path.is_dir():
        found: list[Path | Picture.Image] = [*sorted(file for file in path.iterdir() if not file.name.startswith("."))]
    else:
        try:
            with Picture.open(path) as picture:
                found = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
        except (OSError, SyntaxError, ValueError, Picture.DecompressionBombError):
            raise CodebookError(
                f"cannot read video {path}: give a folder of frames, or an animated GIF, PNG or WebP file"
            ) from None
    if not found:
        raise CodebookError(f"{path} holds no frames: give a folder of pictures")
    count = min(frames, len(found))
    return tuple(found[(2 * i + 1) * len(found) // (2 * count)] for i in range(count))
