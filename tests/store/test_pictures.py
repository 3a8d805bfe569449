"""A picture is shown to a model as a person sees it, or refused."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from codebook.errors import CodebookError
from codebook.store.pictures import is_picture, read_image, read_video

SIXTEEN_BITS = np.array([[0, 32768, 65535], [257, 1000, 60000]])
EIGHT_BITS = [[0, 128, 255], [1, 4, 233]]  # level / 257, rounded


def encoded(picture, form, **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def levels(data):
    found = np.asarray(read_image(data))
    assert found.dtype == np.uint8 and found.shape[2] == 3
    return found


@pytest.mark.parametrize(
    ("dtype", "form"), [("<u2", "PNG"), ("<u2", "TIFF"), ("<u2", "PPM"), (">u2", "TIFF"), ("<i4", "TIFF")]
)
def test_sixteen_bit_grey(dtype, form):
    found = levels(encoded(Image.fromarray(SIXTEEN_BITS.astype(dtype)), form))
    assert all(found[..., channel].tolist() == EIGHT_BITS for channel in range(3))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.0, 200.0], [0, 100, 200]), ([-5.0, 0.0, 1.0], [0, 0, 255]),
        ([0.0, 32768.0, 65535.0], [0, 128, 255]), ([0.0, 1e6, 2e6], [0, 128, 255]),
    ],
)  # fmt: skip
def test_floats(given, expected):
    picture = Image.fromarray(np.array([given], dtype=np.float32))
    assert levels(encoded(picture, "TIFF"))[0, :, 0].tolist() == expected


def tiff(stored, kind, **tags):
    """A TIFF file of one row of grey levels, little-endian, by hand: PIL writes none of these."""
    data = bytes.fromhex(stored.replace(" ", "")) if kind is None else np.array(stored).astype(kind).tobytes()
    given = {"bits": 32, "black": 1, "format": 1} | tags
    entries = [
        (256, 3), (257, 1), (258, given["bits"]), (259, 1), (262, given["black"]), (273, 8 + 2 + 10 * 12 + 4), (277, 1),
        (278, 1), (279, len(data)), (339, given["format"]),
    ]  # fmt: skip
    listed = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + listed + bytes(4) + data


@pytest.mark.parametrize(
    ("stored", "kind", "tags", "expected"),
    [
        ([0, 2**15, 2**16 - 1], "<u2", {"bits": 16}, [0, 128, 255]),
        ([0, 2**15, 2**16 - 1], "<u2", {"bits": 16, "black": 0}, [255, 127, 0]),
        ("000 800 fff 0", None, {"bits": 12}, [0, 128, 255]),
        ([0, 2**31, 2**32 - 1], "<u4", {}, [0, 128, 255]),
        ([-9, 2**30, 2**31 - 1], "<i4", {"format": 2}, [0, 128, 255]),
        ([0.0, 0.25, 1.0], "<f4", {"format": 3}, [0, 64, 255]),
        ([0.0, 0.25, 1.0], "<f4", {"format": 3, "black": 0}, [255, 191, 0]),
    ],
)
def test_the_scale_of_a_tiff_file(stored, kind, tags, expected):
    assert levels(tiff(stored, kind, **tags))[0, :, 0].tolist() == expected


def test_values_that_are_no_numbers():
    picture = Image.fromarray(np.array([[0, np.nan, 1]], dtype=np.float32))
    with pytest.raises(CodebookError, match="no numbers"):
        read_image(encoded(picture, "TIFF"))


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_every_orientation(mode, form):
    """A picture with a bright corner, turned as cameras do: tag 1 to 8 of EXIF, by the standard's table."""
    if mode == "I;16" and form in ("JPEG", "WEBP"):
        pytest.skip("the format has 8 bits")
    picture = Image.new("L", (32, 16))
    picture.paste(255, (0, 0, 8, 8))  # at the first row and column
    stored = Image.fromarray(np.asarray(picture).astype("<u2") * 257) if mode == "I;16" else picture.convert(mode)
    corner = {
        1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left",
        5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left",
    }  # fmt: skip
    for tag, place in corner.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        found = levels(encoded(stored, form, exif=exif))[..., 0]
        assert found.shape == ((16, 32) if tag < 5 else (32, 16))
        row, col = (-3 if word in ("bottom", "right") else 2 for word in place.split())
        assert found[row, col] > 240 and found.mean() < 60, tag


def test_transparent_parts_are_over_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    for form in ("PNG", "GIF"):
        assert levels(encoded(palette, form, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert levels(encoded(palette, "PNG")).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    for picture, options, expected in (
        (Image.new("RGBA", (1, 1), (0, 0, 0, 128)), {}, [127, 127, 127]),
        (Image.new("RGBA", (1, 1), (10, 20, 30, 255)), {}, [10, 20, 30]),
        (Image.new("LA", (1, 1), (0, 0)), {}, [255, 255, 255]),
        (Image.new("L", (1, 1), 7), {"transparency": 7}, [255, 255, 255]),
        (Image.new("RGB", (1, 1), (1, 2, 3)), {"transparency": (1, 2, 3)}, [255, 255, 255]),
    ):
        assert levels(encoded(picture, "PNG", **options))[0, 0].tolist() == expected


def test_other_modes():
    assert levels(encoded(Image.new("1", (2, 2), 1), "PNG")).min() == 255
    red = levels(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize(
    ("bits", "row", "key", "expected"),
    [
        (2, b"\x1b", 2, [0, 85, 255, 255]),
        (4, b"\x07\x8f", 7, [0, 255, 136, 255]),
        (8, b"\0\x07\x08\xff", 7, [0, 255, 8, 255]),
        (16, b"\0\0\0\x07\x80\x80\xff\xff", 7, [0, 255, 128, 255]),
    ],
)
def test_the_transparent_level_is_on_the_scale_of_the_file(bits, row, key, expected):
    """By the standard of PNG: a sample of so many bits, and over white here."""
    header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", key)) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    assert levels(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))[0, :, 0].tolist() == expected


def test_the_transparent_colour_of_sixteen_bits():
    row = struct.pack(">9H", 1, 2, 3, 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0, 0)
    header = struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0)
    key = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    body = chunk(b"IHDR", header) + chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    found = levels(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))
    assert found.tolist() == [[[0, 0, 0], [255, 255, 255], [255, 0, 0]]]


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(
            frames[0], form, save_all=True, append_images=frames[1:], **{} if form != "WEBP" else {"lossless": True}
        )
        assert levels(data)[0, 0].tolist() == [255, 0, 0]


def test_frames_of_a_video_are_read_alike(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(
        tmp_path / "a.webp", save_all=True, append_images=[Image.new("RGB", (4, 2))], exif=exif
    )
    assert {frame.size for frame in read_video(tmp_path / "a.webp")} == {(2, 4)}
    frames = [Image.new("RGB", (4, 2), colour) for colour in ("white", "red", "blue")]
    for still, colours in ((True, [(255, 0, 0), (0, 0, 255)]), (False, [(255, 255, 255), (255, 0, 0), (0, 0, 255)])):
        frames[0].save(tmp_path / "c.png", save_all=True, default_image=still, append_images=frames[1:])
        assert [frame.getpixel((0, 0)) for frame in read_video(tmp_path / "c.png")] == colours
    (tmp_path / "b.webp").write_bytes(b"no video")
    with pytest.raises(
        CodebookError, match=r"cannot read video .*b\.webp: not an image; give an mp4 or webm file, a folder of frames"
    ):
        read_video(tmp_path / "b.webp")


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("BMP", {}), ("GIF", {}),
        ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("JPEG2000", {}),
    ],
)  # fmt: skip
def test_cut_anywhere_it_is_refused_or_whole(form, options):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form, **options)
    whole, refused = levels(data), 0
    for size in range(0, len(data), max(1, len(data) // 60)):
        try:
            assert np.array_equal(levels(data[:size]), whole)
        except CodebookError:
            refused += 1
    assert refused > 50


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height):
    """A small file whose header promises that many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (178_000_000, 1, "178000000 x 1 pixels, and at most 89,478,485"), (30_000, 30_000, "at most 89,478,485"),
        (2_000_000_000, 2_000_000_000, "pixels|size"), (80_000_000, 1, "200 times the other"),
        (1, 201, "200 times the other: cut it$"), (9500, 9500, "at most 89,478,485 are read: scale it down$"),
    ],
)  # fmt: skip
def test_promises_of_too_many_pixels(width, height, message, recwarn):
    start = time.monotonic()
    with pytest.raises(CodebookError, match=message):
        read_image(png(width, height), "x.png")
    assert time.monotonic() - start < 1 and not len(recwarn)


def test_only_whole_pictures_of_known_formats():
    for data in (b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"Python is no picture"):
        assert not is_picture(data[:32])
        with pytest.raises(CodebookError, match="cannot read image x: not an image; use a whole PNG"):
            read_image(data, "x")
    with pytest.raises(CodebookError, match=r"no such image: nowhere\.png"):
        read_image("nowhere.png")


def test_damaged_metadata_leave_the_picture_as_it_is_stored():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    start = data.index(b"Exif")
    for broken in (b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II", b"Exif\0\0" + b"\xff" * 20):
        damaged = data[:start] + broken + data[start + len(broken) :]
        assert levels(damaged).shape[:2] in ((4, 8), (8, 4))
