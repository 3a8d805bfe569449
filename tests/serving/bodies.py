"""Safetensors bodies, written by hand and not by the library: right ones, and hostile ones."""

import json
import struct


def raw(header, data=b""):
    """A file of this header (anything that JSON has, or bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(dtype, shape, size, name="features"):
    """A file of one tensor of so many zero bytes."""
    return raw({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, bytes(size))


def hostile(d=16):
    """Bodies that are refused, for codebooks of dimension `d`: name -> (status, words of the sentence, body)."""
    nan, inf = b"\x00\x7e", b"\x00\x7c"  # of half precision
    good = one("F16", [2, d], 4 * d)
    header = {"dtype": "F16", "shape": [2, d], "data_offsets": [0, 4 * d]}
    return {
        "empty": (400, "cut off", b""),
        "no header": (400, "cut off", b"\x10"),
        "not safetensors": (400, "cut off", b"\x89PNG\r\n\x1a\n" + bytes(100)),
        "cut in the header": (400, "cut off", good[:40]),
        "cut in the data": (400, "bytes", good[:-1]),
        "more than it says": (400, "bytes", good + b"\0"),
        "header of 2^64 bytes": (400, "cut off", b"\xff" * 8 + good),
        "header of 70,000 blanks": (400, "at most 65,536", raw(b"{" + b" " * 70_000 + b"}")),
        "header that is no JSON": (400, "header", raw(b"{'features': 1}")),
        "header that is a list": (400, "header", raw(b"[" * 60_000)),
        "header without offsets": (400, "header", raw({"features": {"dtype": "F16", "shape": [2, d]}})),
        "only a type": (400, "header", raw({"features": {"dtype": "F16"}})),
        "offsets that overlap": (400, "invalid offset", raw({"features": header | {"data_offsets": [2, 4 * d + 2]}},
                                                            bytes(4 * d))),
        "offsets that go back": (400, "cannot read", raw({"features": header | {"data_offsets": [4 * d, 0]}},
                                                         bytes(4 * d))),
        "negative rows": (400, "header", raw({"features": header | {"shape": [-2, d]}}, bytes(4 * d))),
        "pickle": (400, "cut off", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        "two that overlap": (422, "2 tensors", raw({"features": header, "more": header}, bytes(4 * d))),
        "none": (422, "0 tensors", raw({})),
        "another name": (422, "one named 'features'", one("F16", [2, d], 4 * d, "x")),
        "doubles": (422, "F64", one("F64", [2, d], 16 * d)),
        "whole numbers": (422, "I64", one("I64", [2, d], 16 * d)),
        "four bits": (422, "F4", one("F4", [2, d], d)),
        "unknown type": (422, "A" * 20 + ":", one("A" * 3000, [2, d], 0)),
        "a vector": (422, f"(n, {d})", one("F16", [d], 2 * d)),
        "four axes": (422, f"(n, {d})", one("F16", [1, 1, 2, d], 4 * d)),
        "thousands of axes": (422, f"(n, {d})", one("F16", [1] * 5000 + [d], 2 * d)),
        "another dimension": (422, f"(n, {d})", one("F16", [2, d + 1], 4 * (d + 1))),
        "no rows": (422, "at least one token", one("F16", [0, d], 0)),
        "no images": (422, "at least one token", one("F16", [0, 5, d], 0)),
        "no numbers": (422, f"(n, {d})", one("F16", [10**9, 0], 0)),
        "10^9 rows of nothing": (422, "at most 8,192", one("F16", [10**9, d], 0)),
        "10^9 images of nothing": (400, "bytes", one("F16", [10**9, 1, d], 0)),
        "2^62 images": (400, "bytes", one("F16", [2**62, 4, d], 0)),
        "NaN": (422, "NaN", good[: -2] + nan),
        "inf": (422, "infinite", good[: -2] + inf),
        "squares that overflow": (422, "beyond 1e+15", one("F32", [2, d], 8 * d)[: -4] + struct.pack("<f", -1e16)),
    }  # fmt: skip
