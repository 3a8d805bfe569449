"""What the bytes of a file say: JSON that is checked, and tensors."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from codebook.errors import CodebookError, one_line, quoted

if TYPE_CHECKING:  # lists of codebooks are made without torch, which takes a second to import
    from torch import Tensor

MARK = b"\xef\xbb\xbf"
"""Byte-order mark, with which some editors begin a file."""


def parse(path: Path, data: bytes, remedy: str, schema: Any) -> Any:
    """JSON of a file whose bytes are there already, checked like `read_json`."""
    try:
        return _validated(data.removeprefix(MARK), schema)
    except ValueError as error:
        raise CodebookError(f"cannot read {path}: {fault_words(error)}; {remedy}") from None


def parse_lines(path: Path, data: bytes, remedy: str, schema: Any) -> list[tuple[int, Any]]:
    """JSON lines of a file whose bytes are there already, checked like `read_lines`."""
    found = []
    for number, line in enumerate(data.removeprefix(MARK).split(b"\n"), 1):
        if line := line.strip():
            try:
                found.append((number, _validated(line, schema)))
            except ValueError as error:
                raise CodebookError(f"cannot read {path}, line {number}: {remedy} ({fault_words(error)})") from None
    return found


def parse_tensors(path: Path | str, data: bytes, remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose bytes are there already; `path` is what an error calls it."""
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CodebookError(f"cannot read {path}: {one_line(error)}; {remedy}") from None


def parse_arrays(path: Path, data: bytes, remedy: str) -> dict[str, Any]:
    """The same as arrays of NumPy, without torch; it has no bfloat16."""
    from safetensors.numpy import load

    try:
        return load(data)
    except KeyError as error:
        raise CodebookError(f"cannot read {path}: it holds numbers of type {error}; {remedy}") from None
    except (SafetensorError, ValueError, TypeError) as error:
        raise CodebookError(f"cannot read {path}: {one_line(error)}; {remedy}") from None


class RepeatedKeyError(ValueError):
    """A key stands twice in a JSON object: which of its values holds is not the same to every reader."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{quoted(key)} is given twice: give it once")
        self.key = key


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its keys and values, as `json.loads` calls it; raises RepeatedKeyError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return found


def fault_words(error: ValueError) -> str:
    """The first thing that is wrong with some JSON, and where."""
    if not isinstance(error, ValidationError):
        return one_line(error)
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}"[:200] if place else first["msg"][:200]


def _validated(data: bytes, schema: Any) -> Any:
    """The value of some JSON, as it is written: with the order of its keys, which the checked copy would lose.

    Raises ValueError, also for numbers that are none, under whatever key: what is written on would be no JSON.
    """
    _adapter(schema).validate_json(data, strict=True)
    return json.loads(data.decode(), parse_constant=_finite, parse_float=_finite, object_pairs_hook=each_once)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)
