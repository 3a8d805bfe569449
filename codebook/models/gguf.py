"""GGUF, the file format of llama.cpp, read with numpy: metadata and tensors.

Tensors may be F32, Q8_0 or Q4_1, which is all that SmolLM2's file has. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from codebook.errors import CodebookError, remedy_for

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata types of fixed size, as `struct` names them."""

STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCKS = {F32: (1, 4), Q4_1: (32, 20), Q8_0: (32, 34)}
"""Numbers and bytes of one block, for each type of tensor that is read."""

MOST_ITEMS = 2**20
"""Most metadata entries, tensors, or items of an array."""

LARGEST_GGUF = 2**30
"""Most bytes of a file."""


@dataclass(frozen=True)
class Gguf:
    """What a file holds.

    Attributes
    ----------
    metadata : numbers, texts and lists of them, by name
    tensors : float32 arrays in row-major order, by name
    """

    metadata: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read_gguf(path: Path) -> Gguf:
    """Read a file whole.

    Raises
    ------
    CodebookError
        If it is no GGUF of version 3, is damaged, is larger than 1 GiB, or has tensors of a type that is not read.
    """
    try:
        if not path.is_file():  # a pipe would block
            raise CodebookError(f"no file {path}, or no regular one: give the GGUF file itself")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if len(data) > LARGEST_GGUF:
                _refuse(path, f"it has {len(data):,} bytes, more than the {LARGEST_GGUF:,} that are read")
            return _Reader(path, data).read()
    except OSError as error:
        raise CodebookError(f"cannot read {path}: {error.strerror}; {remedy_for(error)}") from None
    except (struct.error, UnicodeDecodeError, ValueError) as error:  # an empty file is a ValueError of mmap
        _refuse(path, f"it is damaged or not all there ({str(error)[:80]})")


def _refuse(path: Path, what: str) -> NoReturn:
    raise CodebookError(f"cannot read {path} as GGUF: {what}; fetch it again")


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.place = path, data, 0

    def read(self) -> Gguf:
        if self.data[:4] != b"GGUF":
            _refuse(self.path, "it does not begin as one")
        self.place = 4
        version, tensors, entries = self.unpack("I"), self.unpack("Q"), self.unpack("Q")
        if version != 3:
            _refuse(self.path, f"it is of version {version} and only 3 is read")
        self.bound(tensors)
        self.bound(entries)
        metadata = {self.text(): self.value(self.unpack("I")) for _ in range(entries)}
        described = [self.described() for _ in range(tensors)]
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or not 0 < align <= 2**16:
            _refuse(self.path, "its alignment is out of range")
        start = -(-self.place // align) * align
        return Gguf(metadata, {told[0]: self.tensor(start, *told) for told in described})

    def unpack(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.place)
        self.place += struct.calcsize("<" + code)
        return value

    def bound(self, count: int) -> int:
        if count > MOST_ITEMS:
            _refuse(self.path, f"it says that it has {count:,} items where at most {MOST_ITEMS:,} are read")
        return count

    def text(self) -> str:
        length = self.unpack("Q")
        end = self.place + length
        if end > len(self.data):
            raise ValueError("a text goes beyond the end")
        raw, self.place = self.data[self.place : end], end
        return raw.decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.unpack("I"), self.bound(self.unpack("Q"))
            if inner == ARRAY:
                raise ValueError("an array of arrays")
            return [self.value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"no such type of metadata: {kind}")
        return self.unpack(SCALARS[kind])

    def described(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of the next tensor."""
        name, axes = self.text(), self.unpack("I")
        if axes > 4:
            raise ValueError(f"a tensor of {axes} axes")
        shape = tuple(self.unpack("Q") for _ in range(axes))[::-1]  # the file has the innermost first
        kind, offset = self.unpack("I"), self.unpack("Q")
        if kind not in BLOCKS:
            _refuse(self.path, f"its tensor {name[:60]!r} is of type {kind} and only F32, Q4_1 and Q8_0 are read")
        return name, shape, kind, offset

    def tensor(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> np.ndarray:
        numbers, size = BLOCKS[kind]
        blocks, rest = divmod(math.prod(shape), numbers)
        begin = start + offset
        if not shape or rest or shape[-1] % numbers or begin + blocks * size > len(self.data):
            raise ValueError(f"the tensor {name[:60]!r} does not fit in")
        raw = np.frombuffer(self.data, np.uint8, blocks * size, begin).reshape(blocks, size).copy()
        return DECODERS[kind](raw).reshape(shape)


def _f32(raw: np.ndarray) -> np.ndarray:
    return raw.view("<f4")


def _q8_0(raw: np.ndarray) -> np.ndarray:
    """A scale in half precision, then 32 signed bytes."""
    return raw[:, 2:].view(np.int8) * raw[:, :2].view("<f2").astype(np.float32)


def _q4_1(raw: np.ndarray) -> np.ndarray:
    """A scale and a minimum in half precision, then 32 nibbles: the low ones of all 16 bytes come first."""
    scale, least = (raw[:, i : i + 2].view("<f2").astype(np.float32) for i in (0, 2))
    nibbles = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], 1)
    return nibbles * scale + least


DECODERS = {F32: _f32, Q4_1: _q4_1, Q8_0: _q8_0}
