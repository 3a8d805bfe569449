"""Records of a journal, checked to have the form that they were written in: a journal is a file like any other."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from codebook.errors import CodebookError
from codebook.store.journal import Journal

Form = TypeVar("Form")

Share = Annotated[float, Field(ge=0, le=1.0001)]
"""A probability or a score; float32 may round a probability of 1 up."""


def read_record(journal: Journal, name: str, form: TypeAdapter[Form], length: int | None = None) -> Form:
    """A record of a journal.

    Parameters
    ----------
    form
        Type of the record.
    length
        How many values it has, if it is a list and that is known.

    Raises
    ------
    CodebookError
        If the record is missing or has another form.
    """
    try:
        record = form.validate_python(journal[name])
    except (KeyError, ValidationError):
        raise damaged(journal) from None
    if length is not None and len(record) != length:  # type: ignore[arg-type]
        raise damaged(journal)
    return record


def damaged(journal: Journal) -> CodebookError:
    """The error for a record that does not have its form."""
    return CodebookError(f"{journal.file} is damaged: delete it, and what it holds is measured again")
