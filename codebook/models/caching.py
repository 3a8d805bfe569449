"""The folder of what this package has fetched or made, and can fetch or make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """This package's folder among the caches of the user who runs it."""
    given = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or ""
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "codebook"


def give_usual_rights(folder: Path) -> None:
    """Let whoever may read a new folder read its files, too: safetensors makes them for their owner alone."""
    for file in folder.iterdir():
        file.chmod(folder.stat().st_mode & 0o666)
