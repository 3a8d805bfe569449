"""Schedule files: a schedule's text in a small JSON file."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from codebook.errors import CodebookError, quoted
from codebook.store.files import write_json
from codebook.store.reading import read_json

SCHEDULE_FORMAT = 1
"""Version of the layout of schedule files."""
LARGEST_SCHEDULE = 2**20
"""Bytes of a schedule file; what calibration adds to it has a few hundred per candidate."""
LAYOUT = f'it should hold {{"format": {SCHEDULE_FORMAT}, "schedule": "..."}}'


class ScheduleFile(BaseModel, strict=True):
    """Contents of a schedule file; whatever else it holds, such as a calibration's evidence, is for people."""

    format: int
    schedule: str


def write_schedule_text(path: Path | str, text: str) -> None:
    """Write a schedule's text to a file, whole or not at all."""
    write_json(path, {"format": SCHEDULE_FORMAT, "schedule": text})


def read_schedule_text(path: Path | str) -> str:
    """The text of a schedule that `Schedule.save` wrote.

    Raises
    ------
    CodebookError
        If the file cannot be read, or holds something else or another format.
    """
    try:
        found = read_json(Path(path), LAYOUT, largest=LARGEST_SCHEDULE)
    except CodebookError as error:
        raise CodebookError(str(error).replace("cannot read", "cannot read schedule", 1)) from None
    try:
        record = ScheduleFile.model_validate(found)
    except ValidationError:
        raise CodebookError(f"{path} is no schedule: {LAYOUT}") from None
    if record.format != SCHEDULE_FORMAT:
        raise CodebookError(
            f"{path} has schedule format {quoted(record.format)}; this version reads format {SCHEDULE_FORMAT}"
        )
    return record.schedule
