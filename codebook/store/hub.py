"""Codebooks on the Hugging Face Hub: one repository each, whose files are those of a codebook's folder. Also data sets.

The hub's own client does the work, with its cache, its token and its settings (`HF_HOME`, `HF_HUB_OFFLINE`,
`HF_ENDPOINT`). Importing this module imports neither it nor torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from codebook.errors import CodebookError, check_revision, is_unreachable, named_line, one_line, quoted, remedy_for
from codebook.store.card import HUB_NAME, SHEET
from codebook.store.folder import CARD, CONFIG, HORIZON_FILE, OPTIONAL, PROTOTYPES, PROVENANCE, read_folder
from codebook.store.reading import LARGEST_JSON, LARGEST_LINES
from codebook.store.registry import LARGEST_DOWNLOAD

REQUIRED = (CONFIG, PROTOTYPES, PROVENANCE)
"""Files without which a repository is no codebook."""
SHARED = (*REQUIRED, CARD, SHEET, HORIZON_FILE, *OPTIONAL)
"""Files that are pulled and pushed; whatever else is in a repository or a folder stays there."""
LARGEST_SHEET = 2**26
"""Bytes of the picture that a card shows."""
LARGEST_DATA_SET = 2**36
"""Bytes of the files of a data set together."""
LIBRARY = "codebook"
"""Name by which the hub counts downloads."""
HUB_WAIT = 60.0
"""Most seconds for a sign from the hub; a commit may take some."""


def check_hub_name(name: str) -> None:
    """Refuse what can be no repository's name on the hub."""
    if not isinstance(name, str) or not HUB_NAME.fullmatch(name):
        raise CodebookError(f"{quoted(name)} is no name of a repository: write OWNER/NAME")


def pull_repository(
    name: str, revision: str | None = None, token: str | bool | None = None, local_files_only: bool = False
) -> Path:
    """The folder, in the hub's cache, of a codebook in a repository; fetched where it is not there yet.

    Only the files of a codebook are fetched, after a look at their sizes, and checked against the SHA-256 in its
    `config.json`. What turns out damaged is fetched once more. Without a connection the cache is looked at, as the
    hub's client does.

    Parameters
    ----------
    name
        `OWNER/NAME`.
    revision
        A branch, a tag or a commit; default: main.
    token
        As the hub's client takes it; default: the one that is saved.
    local_files_only
        Take what is in the cache, and fetch nothing.

    Raises
    ------
    CodebookError
        If there is no such repository or revision, it is no codebook or too large, it cannot be fetched, or what it
        holds is damaged.
    """
    check_hub_name(name)
    check_revision(revision)
    with _asking(f"pull {name}", name, revision):
        online = not local_files_only and _check_repository(name, revision, token)
        folder = _download(name, revision, token, local_files_only=not online)
        try:
            read_folder(folder, OPTIONAL)
        except CodebookError:
            if not online:
                raise
            folder = _download(name, revision, token, force_download=True)
            try:
                read_folder(folder, OPTIONAL)
            except CodebookError as error:
                (folder / PROTOTYPES).unlink(missing_ok=True)  # what is damaged is not listed as a codebook
                raise CodebookError(f"the files of {name} do not belong together: {error}") from None
        return folder


def pull_data_set(name: str, choose: Callable[[list[str]], list[str]], revision: str | None = None) -> list[Path]:
    """Files of a data set's repository, in the hub's cache; fetched if they are not there.

    Parameters
    ----------
    choose
        Those that are wanted, of the names of all; without a connection of all that are in the cache.

    Raises
    ------
    CodebookError
        If there is no such repository or revision, or no such file in it, they are too large, or cannot be fetched.
    """
    from huggingface_hub import HfApi, snapshot_download

    check_hub_name(name)
    check_revision(revision)
    given: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "library_name": LIBRARY}
    with _asking(f"fetch {name}", name, revision):
        try:
            found = HfApi(library_name=LIBRARY).dataset_info(name, revision=revision, files_metadata=True)
        except Exception as error:
            if not is_unreachable(error):
                raise
            folder = Path(snapshot_download(name, local_files_only=True, **given))
            chosen = choose([file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()])
        else:
            sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
            chosen = choose(list(sizes))
            if (total := sum(sizes[file] for file in chosen)) > LARGEST_DATA_SET:
                raise CodebookError(
                    f"{name} has {total:,} bytes of such files: at most {LARGEST_DATA_SET:,} are fetched"
                )
            folder = Path(snapshot_download(name, allow_patterns=chosen, **given)) if chosen else Path()
        if not chosen:
            raise CodebookError(f"{name} has no such files: look at their names on the hub, and say split and config")
        return [folder / file for file in sorted(chosen)]


def push_files(
    files: Mapping[str, bytes],
    name: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Push a codebook's files to a repository, in one commit; make the repository where there is none.

    Parameters
    ----------
    files
        Contents by name; names that `SHARED` has.
    name
        `OWNER/NAME`.
    private
        Whether a new repository can be seen by its owner only; default: as its owner has it for all.
    token
        As the hub's client takes it; default: the one that is saved.
    commit_message
        Default: `Upload codebook`.

    Returns
    -------
    Address of the commit.

    Raises
    ------
    CodebookError
        If the repository cannot be made or written. What was there before then stays as it is.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_hub_name(name)
    with _asking(f"push to {name}", name):
        api = HfApi(library_name=LIBRARY, token=token)
        made = api.create_repo(name, private=private, exist_ok=True)
        if private is not None and api.model_info(made.repo_id).private != private:
            is_now = "public" if private else "private"
            raise CodebookError(f"{name} is there and {is_now}: change that in its settings on the hub, then push")
        operations = [CommitOperationAdd(path, data) for path, data in files.items()]
        commit = api.create_commit(made.repo_id, operations, commit_message=commit_message or "Upload codebook")
        return str(commit.commit_url)


@contextlib.contextmanager
def _asking(what: str, name: str, revision: str | None = None) -> Iterator[None]:
    """A context in which the hub's client is asked: it gives up after HUB_WAIT, and what it raises becomes one line."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["request"]
    hooks.append(_limit_wait)
    try:
        yield
    except CodebookError:
        raise
    except Exception as error:  # the client raises types of its own and of the HTTP library below it
        raise _explained(what, name, revision, error) from None
    finally:
        hooks.remove(_limit_wait)


def _limit_wait(request: Any) -> None:
    """Set the limits of a request that has none, as most of the hub's client, many of which no argument reaches."""
    said = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {step: said.get(step) or HUB_WAIT for step in ("connect", "read", "write", "pool")}


def _check_repository(name: str, revision: str | None, token: str | bool | None) -> bool:
    """Refuse a repository that is no codebook or too large; False if the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = HfApi(library_name=LIBRARY, token=token).model_info(name, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return False
    except Exception as error:
        if is_unreachable(error):
            return False
        raise
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or () if file.rfilename in SHARED}
    if missing := [file for file in REQUIRED if file not in sizes]:
        raise CodebookError(
            f"{name} is no codebook: it has no {missing[0]}; name a repository that `codebook push` made"
        )
    for file, size in sizes.items():
        if size > (limit := _limit(file)):
            raise CodebookError(f"{file} of {name} has {size:,} bytes: at most {limit:,} are fetched")
    if sum(sizes.values()) > LARGEST_DOWNLOAD:
        raise CodebookError(f"{name} has {sum(sizes.values()):,} bytes: at most {LARGEST_DOWNLOAD:,} are fetched")
    return True


def _limit(file: str) -> int:
    if file.endswith(".safetensors"):
        return LARGEST_DOWNLOAD
    if file == SHEET:
        return LARGEST_SHEET
    return LARGEST_LINES if file.endswith(".jsonl") else LARGEST_JSON


def _download(name: str, revision: str | None, token: str | bool | None, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name, revision=revision, token=token, allow_patterns=list(SHARED), library_name=LIBRARY, **options
        )
    )


def _explained(what: str, name: str, revision: str | None, error: Exception) -> CodebookError:
    """The error for what the hub's client raised."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) or is_unreachable(error):
        which = "it" if revision is None else f"its revision {quoted(revision)}"
        missing = "" if what.startswith("push") else f"{which} is not whole in the cache, and "
        if constants.HF_HUB_OFFLINE:
            return CodebookError(f"cannot {what}: {missing}HF_HUB_OFFLINE is set: unset it")
        return CodebookError(
            f"cannot {what}: {missing}{constants.ENDPOINT} is not reached: check the connection, and run the same "
            "command again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CodebookError(f"cannot {what}: it has no revision {quoted(revision)}; name a branch, a tag or a commit")
    if isinstance(error, errors.GatedRepoError):
        return CodebookError(f"cannot {what}: its owner grants access first: ask on {constants.ENDPOINT}/{name}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CodebookError(
            f"cannot {what}: no such repository, or you may not see it; check the name, or log in with `hf auth login`"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        remedy = "log in with `hf auth login`" if status in (401, 403) else "run the same command again later"
        return CodebookError(f"cannot {what}: the hub answers {status} ({one_line(error)}); {remedy}")
    if isinstance(error, OSError) and error.errno:
        return CodebookError(f"cannot {what}: {error.strerror or one_line(error)}; {remedy_for(error)}")
    return CodebookError(f"cannot {what}: {named_line(error)}; run the same command again")
