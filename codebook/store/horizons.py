"""The file of an information horizon that was measured, and which one belongs to a model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, ValidationError

from codebook.errors import CodebookError
from codebook.models import Model, same_fingerprint, whole_fingerprint
from codebook.store.codebook import Codebook
from codebook.store.files import is_file, read_json
from codebook.store.known import find_named, known

HORIZON_FILE = "horizon.json"
"""Name of the file: `codebook horizon --out` writes it, and a codebook's folder may hold it."""

MEASURE = "make one with `codebook horizon --out`"


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


@dataclass(frozen=True)
class MeasuredHorizon:
    """What a horizon.json says about a model.

    Attributes
    ----------
    file
        Where it lies.
    safe : int or None
        The layer from which on all tasks together lose at most its `eps` without visual tokens, margin included; the
        number of layers where that is nowhere. None if the samples could not show a horizon.
    unknown : str or None
        Why not.
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
    try:
        found = HorizonFile.model_validate(read_json(path, MEASURE))
    except ValidationError:
        raise CodebookError(f"{path} is no horizon.json: {MEASURE}") from None
    if any(len(curve.loss) != len(curve.error) for curve in found.horizons.values()):
        raise CodebookError(f"{path} is no horizon.json: {MEASURE}")
    return found.model_dump()


def find_horizon(model: Model, source: Codebook | Path | str | None = None) -> MeasuredHorizon | None:
    """The horizon that was measured on this very model, if it is on this machine.

    Looked at are the folder of the codebook that is named, then those of all codebooks that ship or were fetched.

    Parameters
    ----------
    source
        As `codebook.store.shipped.find_codebook` takes it.

    Raises
    ------
    CodebookError
        If the folder that is named holds the horizon of another model, or none that can be read.
    """
    own = whole_fingerprint(model)
    named = source.folder if isinstance(source, Codebook) else None if source is None else find_named(source)
    if named is not None and is_file(file := named / HORIZON_FILE):
        content = read_horizon(file)
        if not _is_of(content, own):
            raise CodebookError(
                f"{file} was measured on another model, or by a version that did not say on which: measure this one's "
                "with `codebook horizon`, or name the layer, as in codebook+random@20"
            )
        return _whole(file, content)
    for book in known():
        with contextlib.suppress(CodebookError):
            if is_file(file := book.folder / HORIZON_FILE) and _is_of(content := read_horizon(file), own):
                return _whole(file, content)
    return None


def _is_of(content: dict[str, Any], own: str) -> bool:
    return content["fingerprint"] is not None and same_fingerprint(content["fingerprint"], own)


def _whole(file: Path, content: dict[str, Any]) -> MeasuredHorizon:
    """What the file says of all tasks together: of their mean, or of the only one."""
    horizons = content["horizons"]
    curve = horizons.get("mean", next(iter(horizons.values())))
    return MeasuredHorizon(file, curve["safe"], curve["unknown"])
