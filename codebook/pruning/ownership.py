"""The codebooks that a schedule prunes with: which they are, and whether they belong to the model that it prunes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from weakref import WeakKeyDictionary

from codebook.errors import CodebookError, quoted
from codebook.models import Model, codebook_stamp
from codebook.pruning.methods import Pruner
from codebook.pruning.methods.combine import Combination
from codebook.pruning.tokens import digest_rows
from codebook.store.codebook import Codebook

_digests: WeakKeyDictionary[Codebook, int] = WeakKeyDictionary()
"""Digests of codebooks' prototypes: a journal asks for them at every answer."""
_known: WeakKeyDictionary[Model, WeakKeyDictionary[Codebook, Hashable]] = WeakKeyDictionary()
"""Codebooks that were found to be a model's, with the stamp of its weights: a service opens a context per question."""


def codebooks_of(pruner: Pruner) -> Iterator[Codebook]:
    """The codebooks that a pruner chooses by: its own, and those of the pruners that it is made of."""
    if isinstance(own := getattr(pruner, "codebook", None), Codebook):
        yield own
    elif isinstance(own, str | Path):
        raise CodebookError(f"the codebook of {type(pruner).__name__} is {quoted(str(own))}, the name of one: give "
                            "what codebook.Codebook.load reads there")  # fmt: skip
    if isinstance(pruner, Combination):
        for part in pruner.parts:
            yield from codebooks_of(part)


def prototypes_digest(book: Codebook) -> int:
    """A number that tells a codebook's prototypes from those of others, for names in journals."""
    if book not in _digests:
        _digests[book] = int(digest_rows(book.prototypes[None])[0])
    return _digests[book]


def check_codebooks(model: Model, pruners: Iterable[Pruner]) -> None:
    """Raise a CodebookError if the pruners choose by a codebook that was built for another model, or by none.

    Another model's prototypes may have the right dimension, and then prune without an error: by chance.
    """
    books = dict.fromkeys(book for pruner in pruners for book in codebooks_of(pruner))
    stamp = codebook_stamp(model) if books else None
    known = _known.setdefault(model, WeakKeyDictionary())
    for book in books:
        if book not in known or known[book] != stamp:
            book.check(model)
            known[book] = stamp
