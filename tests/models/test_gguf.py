"""Files made byte by byte, as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes them."""

import struct

import numpy as np
import pytest

from codebook.errors import CodebookError
from codebook.models.gguf import read_gguf


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def whole(entries: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries + tensors)
    return head + bytes(-len(head) % 32) + data


@pytest.fixture
def read(tmp_path):
    def reading(content: bytes):
        (tmp_path / "a.gguf").write_bytes(content)
        return read_gguf(tmp_path / "a.gguf")

    return reading


def test_metadata(read):
    words = struct.pack("<IQ", 8, 2) + text("Ġa") + text("")
    held = read(
        whole(
            [entry("n", 4, struct.pack("<I", 30)), entry("theta", 6, struct.pack("<f", 0.5)), entry("words", 9, words)],
            [],
        )
    )
    assert held.metadata == {"n": 30, "theta": 0.5, "words": ["Ġa", ""]}


def test_tensors(read):
    plain = struct.pack("<6f", *range(6))
    eight = struct.pack("<e32b", 0.25, *range(-16, 16))
    # Scale 2 and minimum -3; byte i has i in its low half and 15 - i in its high half.
    four = struct.pack("<ee16B", 2.0, -3.0, *(i | (15 - i) << 4 for i in range(16)))
    data = plain + bytes(8) + eight + bytes(30) + four
    held = read(whole([], [tensor("f", (3, 2), 0, 0), tensor("e", (32,), 8, 32), tensor("q", (32, 1), 3, 96)], data))
    assert held.tensors["f"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert held.tensors["e"].tolist() == [i / 4 for i in range(-16, 16)]
    assert held.tensors["q"].tolist() == [[2 * i - 3 for i in range(16)] + [2 * (15 - i) - 3 for i in range(16)]]
    assert {array.dtype for array in held.tensors.values()} == {np.dtype("float32")}


GOOD = whole([entry("n", 4, struct.pack("<I", 30))], [tensor("f", (2,), 0, 0)], struct.pack("<2f", 1, 2))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged"),
        (b"GGML" + GOOD[4:], "does not begin as one"),
        (whole([], [], version=2), "of version 2"),
        (whole([], [tensor("big", (256,), 14, 0)]), "type 14 and only F32, Q4_1 and Q8_0"),
        (whole([], [tensor("f", (2,), 0, 0)]), "does not fit in"),
        (whole([], [tensor("q", (16, 2), 3, 0)], bytes(20)), "does not fit in"),
        (whole([], [tensor("f", (1,) * 5, 0, 0)], bytes(4)), "of 5 axes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "1,152,921,504,606,846,976 items"),
        (whole([entry("a", 9, struct.pack("<IQ", 9, 1))], []), "array of arrays"),
        (whole([entry("a", 8, struct.pack("<Q", 2**40))], []), "beyond the end"),
        (whole([entry("general.alignment", 4, struct.pack("<I", 0))], []), "alignment"),
        (whole([entry("a", 77, b"")], []), "no such type"),
        (GOOD[:40], "damaged"),
    ],
)
def test_refused(read, content, reason):
    with pytest.raises(CodebookError, match=f"as GGUF: .*{reason}.*fetch it again"):
        read(content)


def test_every_cut_is_refused(read):
    assert read(GOOD).tensors["f"].tolist() == [1, 2]
    for length in range(len(GOOD)):
        with pytest.raises(CodebookError):
            read(GOOD[:length])


def test_no_file(tmp_path):
    with pytest.raises(CodebookError, match="give the GGUF file itself"):
        read_gguf(tmp_path / "none.gguf")
