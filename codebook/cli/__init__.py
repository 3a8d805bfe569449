"""The command line: one file per command. Results go to stdout, everything else to stderr.

A command imports what it needs when it runs, so that `--help` loads neither torch nor transformers.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

import typer

from codebook.cli.bench import bench_command
from codebook.cli.build import build_command
from codebook.cli.calibrate import calibrate_command
from codebook.cli.demo import demo_command
from codebook.cli.doctor import doctor_command
from codebook.cli.explain import explain_command
from codebook.cli.extend import extend_command
from codebook.cli.horizon import horizon_command
from codebook.cli.inspect import inspect_command
from codebook.cli.listing import list_command
from codebook.cli.merge import merge_command
from codebook.cli.miniature import evaluate_command, images_command, train_command
from codebook.cli.prune import prune_command
from codebook.cli.show import show_command
from codebook.errors import CodebookError

COMMANDS: dict[str, Callable[..., None]] = {
    "build": build_command,
    "extend": extend_command,
    "merge": merge_command,
    "prune": prune_command,
    "horizon": horizon_command,
    "calibrate": calibrate_command,
    "bench": bench_command,
    "show": show_command,
    "explain": explain_command,
    "list": list_command,
    "inspect": inspect_command,
    "demo": demo_command,
    "doctor": doctor_command,
}
"""Commands by name, in the order of `codebook --help`."""
MINIATURE_COMMANDS: dict[str, Callable[..., None]] = {
    "images": images_command,
    "train": train_command,
    "evaluate": evaluate_command,
}
"""Commands of `codebook miniature`."""

app = typer.Typer(
    name="codebook",
    help="Training-free visual-token pruning for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
_miniature = typer.Typer(help="The embedded model: its training and its scenes.", no_args_is_help=True)
for _name, _command in MINIATURE_COMMANDS.items():
    _miniature.command(_name)(_command)
app.add_typer(_miniature, name="miniature")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; user errors are one line on stderr and exit code 2."""
    # Read when torch loads its OpenMP: waiting threads would otherwise spin, and starve whatever shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app(argv)
    except CodebookError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            _fail(f"cannot write {error.filename or 'output'}: {error.strerror}; free space or choose another folder")
        raise


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
