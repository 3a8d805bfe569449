"""The command line as its script and `python -m codebook` start it."""

import os
import sys
from typing import Any


def start() -> None:
    """Run the command line; Ctrl-C is one line from the start, while its modules are still being imported."""
    sys.unraisablehook = _end_if_interrupted
    try:
        from codebook.cli import main
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    main()


def _end_if_interrupted(lost: Any) -> None:
    """Ctrl-C that met a library's callback, where nothing can be raised, ends the program all the same, as a kill."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":  # processes that training starts import this file again
    start()
