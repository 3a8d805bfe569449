"""The one exception that users are meant to read, and the words for errors of the operating system."""

from __future__ import annotations

import errno
import re
from collections.abc import Collection

LONGEST_MESSAGE = 600
"""Most characters of a message; a file name alone can have thousands."""

ERROR_WORDS = 200
"""Most characters of another error's words in a message."""

QUOTED = 80
"""Most characters of a value that a message quotes."""

DISTRIBUTION = "redundancy-codebook"
"""Name of this package for pip. On PyPI `codebook` is another project's."""

REVISION = re.compile(r"(?![-./])(?!.*(?:\.\.|//))[^\s\x00-\x1f\x7f~^:?*\[\\]{1,255}")
"""Form of a branch, a tag or a commit, as git takes names; the cache of the Hugging Face Hub has files of them."""

_FULL = "free space or choose another folder"
_FORBIDDEN = "choose another path, or change its permissions"
_NO_LOCKS = "this file system has no file locks: choose a folder on another one"
REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EROFS: "nothing can be written there: choose another folder",
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOLCK: _NO_LOCKS,
    errno.ENOTSUP: _NO_LOCKS,
    errno.EOPNOTSUPP: _NO_LOCKS,
    errno.ENOSYS: _NO_LOCKS,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file: check the path",
    errno.EISDIR: "name a file",
    errno.ELOOP: "it is a symbolic link: name the file itself",
    errno.EMFILE: "raise the limit of open files, `ulimit -n`",
    errno.ENFILE: "close programs that hold many files open",
    errno.EIO: "check the disk",
    errno.ESTALE: "the network folder has gone: mount it again",
    errno.EINTR: "run the same command again",
}
"""What to do about an error of the operating system, by its number."""


class CodebookError(Exception):
    """What is wrong and what to do about it, in one line; the command line exits with code 2."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


def install_command(*extras: str) -> str:
    """The command that installs extras of this package, as messages name it."""
    return f"pip install '{DISTRIBUTION}[{','.join(extras)}]'"


def printable(text: str, limit: int = LONGEST_MESSAGE) -> str:
    """The text as one printable line of at most `limit` characters.

    Control characters, line ends and bytes that are no UTF-8 are written as escapes. Of a longer text the middle is
    left out: what is wrong stands in front, what to do about it at the end.
    """
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(line) <= limit:
        return line
    kept = limit - len(" ... ")
    return f"{line[: kept - kept // 2]} ... {line[-(kept // 2) :]}"


def one_line(error: BaseException, limit: int = ERROR_WORDS) -> str:
    """What an error says, in one line of at most `limit` characters; where it has no words, the name of its class."""
    return _ellipsed(" ".join(str(error).split()), limit) or type(error).__name__


def named_line(error: BaseException, limit: int = ERROR_WORDS) -> str:
    """The same behind the name of its class, for an error of a kind that nobody expected."""
    return _ellipsed(" ".join(f"{type(error).__name__}: {error}".split()), limit)


def _ellipsed(line: str, limit: int) -> str:
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def counted(count: int, noun: str) -> str:
    """A number of things in words: `1 image`, `12 images`; of a noun whose plural ends in s."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def remedy_for(error: OSError, otherwise: str = "choose another folder") -> str:
    """What to do about an error of the operating system."""
    return REMEDIES.get(error.errno or 0, otherwise)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU or a GPU; torch says so in messages of a RuntimeError."""
    messages = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(message in str(error) for message in messages)


def is_unreachable(error: BaseException) -> bool:
    """Whether the hub's client met no server, or may ask none. The HTTP library differs between versions of the client,
    and so do its errors, but not their names."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OfflineModeIsEnabled", "TransportError"})


def check_revision(revision: object) -> None:
    """Refuse what can name no revision of a repository, such as the empty text of a variable that is not set.

    In a cache of the Hugging Face Hub it would name a folder, and at the hub another address. None stands for main.
    """
    if revision is not None and not (isinstance(revision, str) and REVISION.fullmatch(revision)):
        raise CodebookError(f"{quoted(revision)} is no revision: name a branch, a tag or a commit, or leave it out")


def unknown(head: str, name: str, known: Collection[str], remedy: str = "") -> CodebookError:
    """The error for a name that is none of those known: which are most like it, and where the others stand.

    Parameters
    ----------
    head
        What stands before the name, as in `no method`.
    remedy
        What to do; default: all names. Of many it says where they are listed.
    """
    return CodebookError(f"{head} {quoted(name)}: {did_you_mean(name, known)}{remedy or 'use ' + ', '.join(known)}")


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The question whether one of the known names most like this one was meant; empty if none is like it."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=2) if len(name) <= QUOTED else []  # a long one would take long
    return f"did you mean {' or '.join(near)}? " if near else ""


def quoted(value: object) -> str:
    """The repr of a value that a user gave, for an error message; of a long one the beginning."""
    shown = repr(value)
    return shown if len(shown) <= QUOTED else f"{shown[: QUOTED - 4]}...{shown[-1]}"
