"""The codebooks that ship with the package, and which of them belongs to a model."""

from __future__ import annotations

import json
from pathlib import Path

from codebook.errors import CodebookError
from codebook.models import Model, fingerprint, same_fingerprint
from codebook.store.codebook import Codebook


def folders() -> list[Path]:
    """The shipped codebooks' folders: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    for root in (package / "indexes", package.parent / "indexes"):
        if root.is_dir():
            return sorted(path.parent for path in root.glob("*/config.json"))
    return []


def prebuilt(model: Model) -> Codebook:
    """The shipped codebook that was built for this very model: same tower and projector.

    Raises
    ------
    CodebookError
        If none was.
    """
    own = fingerprint(model)
    for folder in folders():
        if same_fingerprint(json.loads((folder / "config.json").read_text())["fingerprint"], own):
            return Codebook.load(folder)
    raise CodebookError(
        "no codebook ships for this model: build one with `codebook build` and name it with --codebook, or prune "
        "without one: --schedule farthest+mass"
    )
