"""Locks on files and folders against other processes, gone when the process is."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from codebook.errors import CodebookError

WRITER_PATIENCE = 10.0
"""Seconds to wait for another process that writes into the same folder."""


def locked(handle: int) -> bool:
    """Lock an open file for this process until the file is closed, or the process killed; False if another has it.

    On Windows nothing is locked, and two runs that write the same files must not go at once.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def writing(folder: Path, patience: float) -> Iterator[None]:
    """Hold a folder against other writers; wait for one, but not for ever. Readers need no lock.

    Where folders cannot be locked, as on Windows and on some network file systems, nothing is held.

    Parameters
    ----------
    patience
        Seconds to wait for another writer.
    """
    with contextlib.ExitStack() as stack:
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:
            pass
        else:
            stack.callback(os.close, handle)
            until = time.monotonic() + patience
            with contextlib.suppress(OSError):
                while not locked(handle):
                    if time.monotonic() > until:
                        raise CodebookError(
                            f"another process is writing {folder}: wait for it, or choose another folder"
                        )
                    time.sleep(0.01)
        yield


def being_written(folder: Path) -> bool:
    """Whether a process holds a folder for `writing`."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            return not locked(handle)
        finally:
            os.close(handle)
    return False
