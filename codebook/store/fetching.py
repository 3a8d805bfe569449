"""Fetching codebooks by name: those of the registry here, those of the Hugging Face Hub by its client (`hub.py`)."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from codebook.errors import CodebookError, one_line, unknown
from codebook.store.card import HUB_NAME
from codebook.store.files import cannot_write, replacing
from codebook.store.folder import CONFIG, packed, read_folder, whole_config, write_folder
from codebook.store.hub import pull_repository
from codebook.store.known import entry_folder, folders
from codebook.store.locks import writing
from codebook.store.reading import CHUNK, is_file, sha256
from codebook.store.registry import RegistryEntry, RegistryFile, entry_named, read_registry

FETCH_PATIENCE = 600.0
"""Seconds to wait for another process that fetches the same codebook."""

Tick = Callable[[int], object]
"""Called with the number of bytes that are there."""


def pull(
    name: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    local_files_only: bool = False,
    tick: Tick = lambda done: None,
) -> Path:
    """The folder of a codebook by its name; what is not on this machine is fetched.

    Parameters
    ----------
    name
        One that ships, one of the registry, or a repository `OWNER/NAME` of the Hugging Face Hub.
    revision, token, local_files_only
        As `codebook.store.hub.pull_repository` takes them; the first two are for repositories only.
    tick
        Progress of a codebook of the registry.

    Raises
    ------
    CodebookError
        If there is none of that name, or it cannot be fetched. Nothing half-written stays.
    """
    shipped = [folder for folder in folders() if folder.name == name]
    entry = entry_named(name)
    if revision is not None and (shipped or entry):
        raise CodebookError(f"{name} has one revision, that of this package's registry: leave the revision out")
    if shipped:
        return shipped[0]
    if entry:
        return fetch_entry(entry, local_files_only, tick)
    if HUB_NAME.fullmatch(name):
        return pull_repository(name, revision, token, local_files_only)
    names = [entry.name for entry in read_registry()]
    raise unknown("no codebook", name, names, f"the registry has {', '.join(names)}, and the hub OWNER/NAME")


def fetch_entry(entry: RegistryEntry, local_files_only: bool = False, tick: Tick = lambda done: None) -> Path:
    """The folder of a codebook of the registry; fetched, checked and converted where it is not in the cache.

    Two processes go one after the other. Each file is checked while it is fetched and kept until all are there, so
    that a run that was stopped goes on.

    Raises
    ------
    CodebookError
        If a file cannot be fetched or is not the one that was reviewed.
    """
    folder = entry_folder(entry)
    if _is_whole(folder):
        return folder
    if local_files_only or _is_offline():
        raise CodebookError(f"the codebook {entry.name} is not in the cache, and nothing may be fetched: go online")
    parts = folder.with_name(f"{entry.revision}.part")
    try:
        parts.mkdir(parents=True, exist_ok=True)
        with writing(folder.parent, FETCH_PATIENCE):
            if _is_whole(folder):  # another process has fetched it meanwhile
                shutil.rmtree(parts, ignore_errors=True)
                return folder
            parts.mkdir(exist_ok=True)
            done = 0
            tick(done)
            for name, file in entry.files.items():
                _fetch_file(file, parts / name, tick, done)
                done += file.size
            _convert(entry, parts, folder)
            shutil.rmtree(parts, ignore_errors=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    finally:
        with contextlib.suppress(OSError):  # a whole file in it is kept for the next run
            parts.rmdir()
    return folder


def _is_whole(folder: Path) -> bool:
    if not is_file(folder / CONFIG):
        return False
    try:
        read_folder(folder)
    except CodebookError:
        return False
    return True


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _fetch_file(file: RegistryFile, path: Path, tick: Tick, before: int) -> None:
    """Fetch one file, `before` bytes being there; it appears only if its size and SHA-256 are those of the registry."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if is_file(path) and sha256(path) == file.sha256:
        tick(before + file.size)
        return
    again = "run the same command again"
    wrong = f"{file.url} is not the file of the registry: "
    digest, size = hashlib.sha256(), 0
    with replacing(path) as temporary, temporary.open("wb") as out:
        try:
            # The hub's session has its settings for proxies and for going offline; it sends no token to other hosts.
            with get_session().stream(
                "GET", file.url, headers={"Accept-Encoding": "identity"}, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as response:
                if response.status_code != 200:
                    raise CodebookError(f"cannot fetch {file.url}: the server answers {response.status_code}; {again}")
                said = response.headers.get("Content-Length", str(file.size))
                if said != str(file.size):
                    raise CodebookError(f"{wrong}it has {said} bytes and not {file.size}; report it")
                for chunk in response.iter_raw(CHUNK):
                    size += len(chunk)
                    if size > file.size:
                        raise CodebookError(f"{wrong}it has more than {file.size} bytes; report it")
                    digest.update(chunk)
                    out.write(chunk)
                    tick(before + size)
        except (CodebookError, OSError):
            raise
        except Exception as error:  # of the HTTP library, which differs between versions of the hub's client
            raise CodebookError(f"cannot fetch {file.url}: {one_line(error)}; {again}") from None
        if size != file.size:
            raise CodebookError(f"cannot fetch {file.url}: it broke off after {size} of {file.size} bytes; {again}")
        if digest.hexdigest() != file.sha256:
            raise CodebookError(f"{wrong}its SHA-256 differs; report it")


def _convert(entry: RegistryEntry, parts: Path, folder: Path) -> None:
    """Make the codebook's folder of an entry's files."""
    if entry.converter == "released":
        from codebook.store.released import read_released  # imports torch

        prototypes, ids = read_released(parts / "tensor", parts / "images")
        config = {
            "model": entry.models[0], "fingerprint": entry.fingerprint, "source": entry.files["tensor"].url,
            "licence": entry.licence, "about_images": entry.images,
        }  # fmt: skip
        config = whole_config(prototypes, config)
        files = packed(prototypes, [{"image": name, "cluster": 0} for name in ids])
    else:
        config, files = read_folder(parts)
    shape = config["prototypes"], config["dimension"]
    if shape != (entry.prototypes, entry.dimension):
        raise CodebookError(f"the codebook {entry.name} is {shape} and not as the registry says: report it")
    write_folder(folder, config, files)
