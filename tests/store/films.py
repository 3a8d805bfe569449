"""Clips for tests, written by PyAV."""

from fractions import Fraction

import numpy as np

KINDS = {"mp4": ("mpeg4", "mp4"), "webm": ("libvpx", "webm")}


def clip(path, count=30, fps=10, size=(64, 48), gap=12, times=None, picture=None):
    """A clip whose frame i is grey of level 8 i, or always the same picture; `times` are in frames."""
    import av

    codec, form = KINDS[path.suffix[1:]]
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": str(gap)})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, fps)
        for i in range(count):
            shown = np.full((size[1], size[0], 3), 8 * i % 256, np.uint8) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.pts = i if times is None else times[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
