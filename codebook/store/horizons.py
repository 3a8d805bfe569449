"""The file of an information horizon that was measured, and which one belongs to a model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, ValidationError

from codebook.errors import CodebookError, printable
from codebook.models import Model, same_fingerprint, whole_fingerprint
from codebook.store.codebook import Codebook
from codebook.store.files import cannot_write, replacing
from codebook.store.folder import HORIZON_FILE
from codebook.store.known import find_named, known
from codebook.store.parsing import parse
from codebook.store.reading import is_file, read_whole

MEASURE = "make one with `codebook horizon --out`"
OF_ANOTHER = "is of another model, or of a version that did not say of which"
LONGEST_REASON = 100
"""Most characters of a file's own words that a message repeats."""


class HorizonCurve(BaseModel):
    """One task of a horizon.json; `layer`, `interval` and `safe` are None where nothing is known."""

    loss: list[FiniteFloat] = Field(min_length=1)
    error: list[FiniteFloat | None]
    layer: int | None
    interval: tuple[int, int] | None
    safe: NonNegativeInt | None
    unknown: str | None = None


class HorizonFile(BaseModel):
    """What is read of a horizon.json; one without a fingerprint, of an older version, belongs to no model."""

    eps: FiniteFloat
    start: NonNegativeInt
    horizons: dict[str, HorizonCurve] = Field(min_length=1)
    fingerprint: str | None = None
    metric: str | None = None


@dataclass(frozen=True)
class MeasuredHorizon:
    """What a horizon.json says about a model.

    Attributes
    ----------
    file
        Where it lies.
    safe : int or None
        The layer from which on all tasks together lose at most its `eps` without visual tokens, margin included; the
        number of layers where that is nowhere. None if the file does not say.
    unknown : str or None
        Why not, as words that go on from the file's name.
    """

    file: Path
    safe: int | None
    unknown: str | None = None


def read_horizon(path: Path) -> dict[str, Any]:
    """The checked contents of a horizon.json, as far as they are used: the keys of `HorizonFile`.

    Raises
    ------
    CodebookError
        If the file is none.
    """
    return _parse_horizon(path, read_whole(path, MEASURE))


def check_horizon(path: Path, content: dict[str, Any], model: Model) -> None:
    """Refuse a horizon, read from this file, that was measured on another model.

    Raises
    ------
    CodebookError
    """
    if not _is_of(content, whole_fingerprint(model)):
        raise CodebookError(f"{path} {OF_ANOTHER}: {MEASURE}")


def check_metric(path: Path, metric: str) -> None:
    """Refuse to write a horizon of one metric over the file of another, if there is one.

    Raises
    ------
    CodebookError
    """
    found = None
    with contextlib.suppress(CodebookError):  # what is no horizon may be written over
        found = read_horizon(path)["metric"] if is_file(path) else None
    if found not in (None, metric):
        own = printable(found, LONGEST_REASON)
        raise CodebookError(f"{path} is of the metric {own}: rename it and horizon.png, or choose another --out")


def _parse_horizon(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = HorizonFile.model_validate(parse(path, data, MEASURE, Any))
    except ValidationError:
        raise CodebookError(f"{path} is no horizon.json: {MEASURE}") from None
    if any(len(curve.loss) != len(curve.error) for curve in found.horizons.values()):
        raise CodebookError(f"{path} is no horizon.json: {MEASURE}")
    return found.model_dump()


def find_horizon(model: Model, source: Codebook | Path | str | None = None) -> MeasuredHorizon | None:
    """The horizon that was measured on this very model, if it is on this machine.

    Looked at are the folder of the codebook that is named, then those of all codebooks that ship or were fetched. Where
    none of them has it, but the first has that of another model, the answer names that file.

    Parameters
    ----------
    source
        As `codebook.store.shipped.find_codebook` takes it.

    Raises
    ------
    CodebookError
        If the folder that is named holds a horizon that cannot be read.
    """
    own, other = whole_fingerprint(model), None
    named = source.folder if isinstance(source, Codebook) else None if source is None else find_named(source)
    if named is not None and is_file(file := named / HORIZON_FILE):
        content = read_horizon(file)
        if _is_of(content, own):
            return _whole(file, content)
        other = MeasuredHorizon(file, None, OF_ANOTHER)
    for book in known():
        with contextlib.suppress(CodebookError):
            if is_file(file := book.folder / HORIZON_FILE) and _is_of(content := read_horizon(file), own):
                return _whole(file, content)
    return other


def carried_horizon(folder: Path, fingerprint: str | None) -> bytes | None:
    """The horizon.json of a codebook's folder, for where the codebook goes: pushed, or grown into another.

    Parameters
    ----------
    fingerprint
        That of the codebook. A horizon of another tower or projector, or one that does not say of which model it is, is
        left behind. None: not known, as for an imported codebook.

    Returns
    -------
    The file's bytes, or None if there is none to carry.

    Raises
    ------
    CodebookError
        If the file is no horizon.json.
    """
    if not is_file(file := folder / HORIZON_FILE):
        return None
    data = read_whole(file, MEASURE)
    whole = _parse_horizon(file, data)["fingerprint"]
    if whole is None or (fingerprint is not None and not same_fingerprint(fingerprint, whole.rpartition(":")[0])):
        return None
    return data


def put_horizon(folder: Path, data: bytes | None) -> None:
    """Write the horizon.json of a codebook's folder; None, from `carried_horizon`, writes nothing."""
    if data is None:
        return
    try:
        with replacing(folder / HORIZON_FILE) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise cannot_write(folder / HORIZON_FILE, error) from None


def _is_of(content: dict[str, Any], own: str) -> bool:
    return content["fingerprint"] is not None and same_fingerprint(content["fingerprint"], own)


def _whole(file: Path, content: dict[str, Any]) -> MeasuredHorizon:
    """What the file says of all tasks together: of their mean, or of the only one."""
    horizons = content["horizons"]
    curve = horizons.get("mean", next(iter(horizons.values())))
    if curve["safe"] is not None:
        return MeasuredHorizon(file, curve["safe"])
    reason = f": {printable(curve['unknown'], LONGEST_REASON)}" if curve["unknown"] else ""
    return MeasuredHorizon(file, None, f"could not show a horizon{reason}")
