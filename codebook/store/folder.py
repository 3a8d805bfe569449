"""The codebook's folder on disk (docs/format.md): what its files must look like, and reading them as one.

A folder may be read while another process writes it. `config.json` is written last and holds the SHA-256 of the others,
so a reader that finds them to fit has one codebook and not parts of two.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Required

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from codebook.errors import CodebookError
from codebook.store.card import make_card
from codebook.store.files import cannot_write, remove_stale, write_files
from codebook.store.locks import WRITER_PATIENCE, being_written, writing
from codebook.store.parsing import parse, parse_arrays, parse_lines, parse_tensors
from codebook.store.reading import LARGEST_JSON, LARGEST_LINES, is_folder, read_tensor_bytes, read_whole

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
CONFIG, PROTOTYPES, PROVENANCE, CARD = "config.json", "prototypes.safetensors", "provenance.jsonl", "README.md"
IMAGE_RECORDS, SURVIVORS, PROBES = "images.jsonl", "survivors.safetensors", "probes.jsonl"
HORIZON_FILE = "horizon.json"
"""Name of a model's measured horizon, which a folder may hold; not one of the hashed files."""
OPTIONAL = (IMAGE_RECORDS, SURVIVORS, PROBES)
"""Files that a codebook may have: what `extend` and `merge` need, and what `build --exhaustive` measured."""
SHORTEST = 1e-12
"""Length up to which torch does not scale a vector to length 1."""
BUILD_AGAIN = "rebuild with `codebook build`"
REBUILD = f"restore the file, or {BUILD_AGAIN}"
"""Remedies: of a file that holds what no codebook does, and of one that is missing or damaged."""
OPEN = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
"""Rule for the objects in files: what is known is checked, and what other versions add is kept."""

Count = Annotated[int, Field(ge=0, lt=2**53)]
Side = Annotated[int, Field(ge=1, lt=2**16)]
"""Rows or columns of a grid of visual tokens."""


class TokenRecord(TypedDict, total=False):
    """A visual token of an image, as every file of a codebook names it."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    row: Count
    col: Count
    p1: float
    jsd_region: float
    jsd_global: float


class ProvenanceRecord(TokenRecord, total=False):
    """A line of `provenance.jsonl`: where a prototype came from."""

    cluster: Required[Count]
    image: str


class ImageCounts(TypedDict, total=False):
    """How many images a codebook was built from."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    used: Required[Count]
    skipped: Required[list[str]]
    duplicates: Count


class Thresholds(TypedDict, total=False):
    """What the store and its readers know of a build's settings; `codebook.building` checks them all."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    tau_p: float
    tau_j: float
    global_weight: float


Fraction = Annotated[float, Field(ge=0, le=1)]


class PilotReport(TypedDict):
    """How the thresholds of a codebook were found, where a pilot found them."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    images: Count
    select: Fraction
    chosen: list[Literal["tau_p", "tau_j"]]
    read: Count
    probed: Count
    isolated: Count
    passed: Count
    quantile: Fraction
    p1: list[tuple[Fraction, float]]
    jsd: list[tuple[Fraction, float]]


class StabilityPoint(TypedDict, total=False):
    """The codebook of some number of images, and how far it agrees with the one before."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    images: Required[Count]
    prototypes: Required[Count]
    agreement: Annotated[float, Field(ge=-1, le=1)]


class StabilityReport(TypedDict):
    """How a build found out that it had seen enough images."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    agreement: Fraction
    given: str
    set_aside: Count
    curve: list[StabilityPoint]


class Versioned(TypedDict):
    """What every version of `config.json` has."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    format_version: int


class Config(TypedDict, total=False):
    """The contents of `config.json`."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    format_version: Required[int]
    model: Required[str]
    fingerprint: Required[str | None]
    dimension: Required[Count]
    prototypes: Required[Count]
    sha256: Required[dict[str, str]]
    dtype: str
    language_model: str
    settings: Thresholds
    images_sha256: str
    images: ImageCounts
    funnel: dict[str, Count]
    spread: float | None
    grid: Annotated[list[Side], Field(min_length=2, max_length=2)]
    pad: Count
    pilot: PilotReport
    stability: StabilityReport
    extended_by: Count
    source: str
    licence: str
    about_images: str
    exhaustive: bool
    extends: str


def read_config(path: Path) -> dict[str, Any]:
    """The checked contents of a folder's `config.json`.

    Raises
    ------
    CodebookError
        If there is none, or it is not that of a codebook of this version.
    """
    return _parse_config(path, read_whole(path / CONFIG, "name a whole codebook folder", LARGEST_JSON))


def read_folder(path: Path, optional: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The config of a codebook, and the contents of its files by their names; all of one codebook.

    Parameters
    ----------
    optional
        Names of files that are read too where the config lists them.

    Raises
    ------
    CodebookError
        If the folder is no codebook, or a file is missing or damaged.
    """
    if not is_folder(path):
        raise CodebookError(f"no such folder: {path}; name a codebook, or make one with `codebook build`")
    until = time.monotonic() + WRITER_PATIENCE
    while True:
        written = _config_stamp(path)
        config = read_config(path)
        try:
            names = [PROTOTYPES, PROVENANCE, *(name for name in optional if name in config["sha256"])]
            return config, {name: _verified(path / name, config["sha256"].get(name)) for name in names}
        except CodebookError as error:
            # Another process may be between the first file that it replaces and the last, which is the config.
            if not being_written(path) and _config_stamp(path) == written:
                raise error from None
            if time.monotonic() > until:
                raise CodebookError(f"{path} is being written by another process: try again later") from None
            time.sleep(0.005)


def whole_config(prototypes: Any, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """A config with all that is required, for prototypes (N, d)."""
    return {
        "format_version": FORMAT_VERSION, "model": "unknown", "fingerprint": None,
        **(config or {}),
        "dimension": prototypes.shape[1], "prototypes": len(prototypes),
    }  # fmt: skip


def packed(prototypes: Tensor, provenance: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """The contents of the two files beside the config: prototypes (N, d) float32, and a line about each."""
    from safetensors.torch import save

    rows = "".join(json.dumps(record) + "\n" for record in provenance)
    return {PROTOTYPES: save({"prototypes": prototypes.cpu()}), PROVENANCE: rows.encode()}


def sealed(config: dict[str, Any], files: Mapping[str, bytes], card: str | None = None) -> dict[str, bytes]:
    """The contents of a whole folder, `config.json` last: with the SHA-256 of the others, and a card.

    Parameters
    ----------
    card
        Default: the one that `make_card` makes.
    """
    config = {**config, "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}
    text = json.dumps(config, indent=2) + "\n"
    return {**files, CARD: (card or make_card(config)).encode(), CONFIG: text.encode()}


def write_folder(path: Path, config: dict[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """Write a codebook's files, each replaced as a whole, `config.json` last; the config with their SHA-256."""
    contents = sealed(config, files)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with writing(path, WRITER_PATIENCE):
            remove_stale(path)
            write_files(path, contents)
    except OSError as error:
        raise cannot_write(path, error) from None
    written: dict[str, Any] = json.loads(contents[CONFIG])
    return written


def _config_stamp(path: Path) -> tuple[int, int] | None:
    """Inode and time of a folder's `config.json`: they differ from one writing to the next, whatever it holds."""
    with contextlib.suppress(OSError):
        found = (path / CONFIG).stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _parse_config(path: Path, text: bytes) -> dict[str, Any]:
    remedy = "name a folder made by `codebook build`"
    version = parse(path / CONFIG, text, f"it is not a codebook's: {remedy}", Versioned)["format_version"]
    if version != FORMAT_VERSION:
        raise CodebookError(
            f"{path} has format version {version} and this package reads {FORMAT_VERSION}: upgrade the package, or "
            f"{BUILD_AGAIN}"
        )
    config: dict[str, Any] = parse(path / CONFIG, text, BUILD_AGAIN, Config)
    return config


def _verified(path: Path, digest: str | None) -> bytes:
    """The contents of a file, read once and checked as they were read."""
    if path.suffix == ".safetensors":
        data = read_tensor_bytes(path, REBUILD)
    else:
        data = read_whole(path, REBUILD, LARGEST_LINES, LARGEST_JSON)
    if hashlib.sha256(data).hexdigest() != digest:
        raise CodebookError(f"{path} is damaged (its SHA-256 differs from the one in {CONFIG}): {REBUILD}")
    return data


def parse_book(path: Path, config: dict[str, Any], files: Mapping[str, bytes]) -> tuple[Any, list[dict[str, Any]]]:
    """The prototypes, as an array (N, d) float32 of NumPy, and the provenance of a folder that `read_folder` has read.

    Raises
    ------
    CodebookError
        If they are not as they must be, or not what the config says.
    """
    import numpy as np

    arrays = parse_arrays(path / PROTOTYPES, files[PROTOTYPES], REBUILD)
    if set(arrays) != {"prototypes"}:
        raise _not_one(path / PROTOTYPES, "prototypes")
    prototypes = arrays["prototypes"]
    if prototypes.ndim != 2 or not prototypes.size or prototypes.dtype != np.float32:
        raise CodebookError(
            f"{path}: prototypes are {prototypes.shape} {prototypes.dtype}: they must be (N, d) float32, N >= 1; "
            f"{BUILD_AGAIN}"
        )
    if prototypes.shape != (config["prototypes"], config["dimension"]):
        raise CodebookError(
            f"{path}: prototypes are {prototypes.shape} but {CONFIG} says "
            f"({config['prototypes']}, {config['dimension']}); {BUILD_AGAIN}"
        )
    check_lengths(np.sqrt(np.einsum("nd,nd->n", prototypes, prototypes)), f"{path}: ")
    rows = parse_lines(path / PROVENANCE, files[PROVENANCE], BUILD_AGAIN, ProvenanceRecord)
    if len(rows) != len(prototypes):
        raise CodebookError(
            f"{path}: provenance has {len(rows)} records for {len(prototypes)} prototypes: {BUILD_AGAIN}"
        )
    return prototypes, [row for _, row in rows]


def check_lengths(lengths: Any, where: str = "") -> None:
    """Refuse prototypes that point nowhere, and so are like no token: by their lengths (N,), an array or a tensor.

    One of NaN or infinite values has no length, one of zeros no direction.

    Raises
    ------
    CodebookError
        Naming the first.
    """
    usable = (lengths > SHORTEST) & (lengths < math.inf)
    if not usable.all():
        row = usable.tolist().index(False)
        raise CodebookError(
            f"{where}prototype {row} points nowhere: its values are NaN, infinite or too large, or all zero; "
            f"{BUILD_AGAIN}"
        )


def tensor_of(path: Path, data: bytes, name: str) -> Tensor:
    """The one tensor that a file of a codebook holds."""
    tensors = parse_tensors(path, data, BUILD_AGAIN)
    if set(tensors) != {name}:
        raise _not_one(path, name)
    return tensors[name]


def _not_one(path: Path, name: str) -> CodebookError:
    return CodebookError(f"{path} must hold one tensor named {name}: {BUILD_AGAIN}")
