"""The standard streams, where they are closed, broken or cannot show every character."""

from __future__ import annotations

import contextlib
import logging
import os
import sys

from codebook.errors import CodebookError, printable


def prepare_streams() -> None:
    """Make the standard streams safe to write any text to.

    Raises
    ------
    CodebookError
        If standard output is closed: a result would be lost.
    """
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Otherwise the next file that is opened takes the stream's place, and is written to by mistake.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an encoding without a character shows its escape
            stream.reconfigure(errors="backslashreplace")
    if closed:
        raise CodebookError("standard output is closed: send it to a file, or to /dev/null")


def say(message: str) -> None:
    """Print one line to stderr, if there is anyone to read it."""
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except OSError:
        _mute(sys.stderr)


class StderrHandler(logging.Handler):
    """Prints what the package logs, a line per record, to what stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def start_logging() -> None:
    """Have the logger `codebook` print notes and warnings to stderr; `--quiet` then raises its level."""
    package = logging.getLogger("codebook")
    package.setLevel(logging.INFO)
    if not any(isinstance(handler, StderrHandler) for handler in package.handlers):
        package.addHandler(StderrHandler())


def flush_output() -> OSError | None:
    """Write out what is printed so far; the error, if that was not possible."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _mute(sys.stdout)
        return error
    return None


def _mute(stream: object) -> None:
    """Let what a stream still holds vanish: the interpreter flushes it once more at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # type: ignore[attr-defined]
        os.close(null)
