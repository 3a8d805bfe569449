"""The bodies of `POST /v1/codebooks/{name}/score`: what the service and its client agree on. It needs no torch."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

FEATURES_NAME, REDUNDANCY_NAME, KEPT_NAME = "features", "redundancy", "kept"
"""Names of the tensors: the one of a question, and the two of its answer."""
METADATA = "__metadata__"
"""Entry of a header that is no tensor."""
MEDIA_TYPE = "application/octet-stream"
"""Type of both bodies; safetensors has none of its own."""
LONGEST_HEADER = 2**16
"""Bytes of a body's header; that of one tensor has about a hundred."""
WIDTHS = {"F16": 2, "BF16": 2, "F32": 4}
"""Number types of features, in the words of safetensors, and their bytes."""
MOST_IMAGE_TOKENS = 2**13
"""Tokens of an image: `seeded` compares each with each, and so many take a quarter of a gigabyte."""


class ServedCodebook(TypedDict):
    """What `GET /v1/codebooks` says of a codebook."""

    name: str
    """The name under which it is scored."""
    model: str
    dimension: int
    """Numbers per token."""
    prototypes: int
    """How many prototypes there are."""
    fingerprint: str | None
    """Identifies the model's tower and projector; None for a codebook that was imported."""
    sha256: str
    """Digest of `prototypes.safetensors`."""


class TensorHeader(TypedDict):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


_HEADER, _TENSOR = TypeAdapter(dict[str, dict[str, Any]]), TypeAdapter(TensorHeader)


class Malformed(ValueError):
    """A body that is no safetensors file."""


class Misfit(ValueError):
    """A safetensors file that holds no features for this codebook."""


def check_features(body: bytes, dimension: int) -> None:
    """Refuse a body, by its header alone, that does not hold features for a codebook.

    Parameters
    ----------
    dimension
        Numbers per token.

    Raises
    ------
    Malformed, Misfit
    """
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > len(body) - 8:
        raise Malformed(f"the body is cut off, or no safetensors file: its header has {length:,} bytes, and it ends "
                        f"after {max(0, len(body) - 8):,}")  # fmt: skip
    if length > LONGEST_HEADER:
        raise Malformed(f"the header has {length:,} bytes: at most {LONGEST_HEADER:,} are read")
    try:
        header = _HEADER.validate_json(body[8 : 8 + length], strict=True)
        tensors = [_TENSOR.validate_python(header[name], strict=True) for name in header if name != METADATA]
    except ValidationError:
        raise Malformed("the header is not that of a safetensors file") from None
    if set(header) - {METADATA} != {FEATURES_NAME}:
        raise Misfit(f"the body holds {len(tensors)} tensors: send one named {FEATURES_NAME!r}")
    [tensor] = tensors
    if tensor["dtype"] not in WIDTHS:
        raise Misfit(f"features are {tensor['dtype'][:20]}: send {', '.join(WIDTHS)}")
    shape = tensor["shape"]
    if len(shape) not in (2, 3) or shape[-1] != dimension:
        raise Misfit(f"features are {_shown(shape)}: this codebook scores (n, {dimension}) or (images, n, {dimension})")
    if 0 in shape:
        raise Misfit(f"features are {_shown(shape)}: send at least one token")
    if shape[-2] > MOST_IMAGE_TOKENS:
        raise Misfit(f"an image has {shape[-2]:,} tokens: at most {MOST_IMAGE_TOKENS:,} are scored; send it in parts")
    size = math.prod(shape) * WIDTHS[tensor["dtype"]]
    if size != len(body) - 8 - length:
        raise Malformed(f"features {_shown(shape)} have {size:,} bytes, and the body {len(body) - 8 - length:,}")


def _shown(shape: list[int]) -> str:
    return f"({', '.join(map(str, shape[:4]))}{', ...' if len(shape) > 4 else ''})"
