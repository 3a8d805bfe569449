"""The inverted file of a large codebook: made once, kept beside the codebook as a cache, and mapped into memory.

A token is compared with the prototypes of those lists that are nearest to it. How many lists that takes is measured
when the index is made. The index is read only if its SHA-256 is the one that the user's own cache folder recorded when
it was written, so FAISS never parses a file that came with a codebook.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from codebook.errors import CodebookError
from codebook.models.caching import cache_folder
from codebook.store.files import replacing, write_text
from codebook.store.locks import locked
from codebook.store.reading import read_json, sha256

AGREEMENT = 0.999
"""Least share of keep decisions that are those of the exact search, at any keep ratio."""
MEASURED = 4608
"""Tokens that it is measured on."""
LISTS_PER_SEARCHED = 32
"""Lists of which one is searched at most. An inverted file compares token by token, about twelve times slower than a
product of matrices: if it needs more lists, the exact search is about as fast."""
ROUNDING_ERROR = 1e-5
"""Largest difference of two similarities that float32 may have computed in two ways."""
INDEX_FILE = "prototypes.faiss"

Vectors = np.ndarray[Any, np.dtype[np.float32]]


class Record(TypedDict):
    """What is known of an index.

    Attributes
    ----------
    lists, searched
        Its lists, and how many of them a token needs; none are searched where the exact search is as fast.
    agreement
        At least this share of keep decisions are those of the exact search.
    sha256
        SHA-256 of its file; empty where there is none.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]
    lists: Annotated[int, Field(ge=1)]
    searched: Annotated[int, Field(ge=0)]
    agreement: Annotated[float, Field(ge=0, le=1)]
    sha256: str


@dataclass(frozen=True)
class Place:
    """Where the index of a codebook is kept.

    Attributes
    ----------
    folder
        The codebook's. If nothing can be written there, the index goes to the user's cache folder.
    digest
        SHA-256 of its `prototypes.safetensors`.
    """

    folder: Path
    digest: str


def inverted_file(faiss: Any, prototypes: Callable[[], Vectors], place: Place) -> Any:
    """The index of a codebook, from the cache or made now.

    Parameters
    ----------
    prototypes
        Gives the prototypes, each of length 1: (N, d) float32. Called only if the index is made.

    Returns
    -------
    An IndexIVFFlat of FAISS, or None: where the exact search is as fast, and where nothing can be kept, since the index
    would be made again by every process.
    """
    try:
        cache = cache_folder()
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{place.digest}-faiss-{faiss.__version__}"
        record = cache / f"{name}.json"
        files = (place.folder / INDEX_FILE, cache / f"{name}.faiss")
        with _alone(cache / f"{name}.lock"):
            known = _recorded(record)
            if known is not None and not known["searched"]:
                return None
            if known is not None:
                for path in files:
                    with contextlib.suppress(CodebookError):
                        if sha256(path) == known["sha256"]:
                            return _mapped(faiss, path)
            return _made(faiss, prototypes(), record, files)
    except (OSError, RuntimeError):  # no home, or one that cannot be written; what FAISS cannot map
        return None


def _made(faiss: Any, prototypes: Vectors, record: Path, files: tuple[Path, ...]) -> Any:
    """Make the index, measure it, and keep it in the first place that can be written."""
    logging.getLogger(__name__).warning(
        "making a search index of %s prototypes: once, for at most a few minutes", f"{len(prototypes):,}"
    )
    index, agreement = measured_index(faiss, prototypes)
    found = {"lists": index.nlist, "searched": index.nprobe, "agreement": agreement, "sha256": ""}
    if not index.nprobe:
        write_text(record, json.dumps(found))
        return None
    for path in files:
        with contextlib.suppress(OSError, RuntimeError, CodebookError):
            with replacing(path) as temporary:
                faiss.write_index(index, str(temporary))
            write_text(record, json.dumps(found | {"sha256": sha256(path)}))
            return _mapped(faiss, path)
    return index


def measured_index(faiss: Any, prototypes: Vectors) -> tuple[Any, float]:
    """An index that searches as few lists as give the agreement, or 0 if those are too many; and what was measured.

    It is measured on tokens like those of a new image, before the index has seen them. Half are prototypes that are
    left out: further members of the clusters, which are to be dropped. Half are means of two of these: tokens unlike
    any cluster, between the lists, where a search of few lists is the hardest. A token whose nearest prototype is
    missed looks less redundant than it is; whatever the keep ratio, that changes two decisions at most: it stays, and
    another does not.

    Parameters
    ----------
    prototypes : (N, d) float32
        Each of length 1.
    """
    random = np.random.default_rng(0)
    left_out = np.sort(random.choice(len(prototypes), min(MEASURED, len(prototypes)) // 2, replace=False))
    others = np.delete(np.arange(len(prototypes)), left_out)
    rest, near = prototypes[others], prototypes[left_out]
    between = near + near[random.permutation(len(near))]
    tokens = np.concatenate([near, between / np.maximum(np.linalg.norm(between, axis=1, keepdims=True), 1e-12)])

    lists = min(int(4 * len(prototypes) ** 0.5), len(rest))
    index = faiss.index_factory(prototypes.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.niter = 0, 10
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 40
    index.train(rest)
    index.add_with_ids(rest, others)
    highest = faiss.knn(tokens, rest, 1, faiss.METRIC_INNER_PRODUCT)[0]
    index.nprobe, agreement = 1, 0.0
    while index.nprobe * LISTS_PER_SEARCHED <= lists:
        missed = float((index.search(tokens, 1)[0] < highest - ROUNDING_ERROR).mean())
        agreement = max(0.0, 1 - 2 * missed)
        if agreement >= AGREEMENT:
            index.add_with_ids(near, left_out)
            return index, agreement
        index.nprobe = max(index.nprobe + 1, index.nprobe * 3 // 2)
    index.nprobe = 0
    return index, agreement


def _mapped(faiss: Any, path: Path) -> Any:
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def _recorded(record: Path) -> Record | None:
    with contextlib.suppress(CodebookError):
        found: Record = read_json(record, "it will be written again", Record)
        return found
    return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for others who make the same index; what a killed process held is free at once."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # folders without locks: then two may make it, each a whole one
            while not locked(handle):
                time.sleep(0.05)
        yield
    finally:
        os.close(handle)
