"""The command line: one file per command. Results go to stdout, everything else to stderr.

A command imports what it needs when it runs, so that `--help` loads neither torch nor transformers.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from codebook import __version__
from codebook.cli.bench import bench_command
from codebook.cli.build import build_command
from codebook.cli.calibrate import calibrate_command
from codebook.cli.check import check_command
from codebook.cli.demo import demo_command
from codebook.cli.doctor import doctor_command
from codebook.cli.explain import explain_command
from codebook.cli.extend import extend_command
from codebook.cli.horizon import horizon_command
from codebook.cli.importing import import_command
from codebook.cli.inspect import inspect_command
from codebook.cli.listing import list_command
from codebook.cli.merge import merge_command
from codebook.cli.miniature import evaluate_command, images_command, train_command
from codebook.cli.options import with_quiet
from codebook.cli.output import Interrupted
from codebook.cli.prune import prune_command
from codebook.cli.pull import pull_command
from codebook.cli.push import push_command
from codebook.cli.serve import serve_command
from codebook.cli.show import show_command
from codebook.cli.streams import flush_output, prepare_streams, say, start_logging
from codebook.cli.tune import tune_command
from codebook.cli.vllm import vllm_args_command
from codebook.errors import CodebookError, named_line, out_of_memory, remedy_for

USER_ERROR, UNEXPECTED, BROKEN_PIPE, INTERRUPTED = 2, 1, 141, 130
"""Exit codes."""

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo_command,
    "prune": prune_command,
    "show": show_command,
    "explain": explain_command,
    "bench": bench_command,
    "build": build_command,
    "extend": extend_command,
    "merge": merge_command,
    "inspect": inspect_command,
    "list": list_command,
    "pull": pull_command,
    "push": push_command,
    "import": import_command,
    "horizon": horizon_command,
    "calibrate": calibrate_command,
    "tune": tune_command,
    "serve": serve_command,
    "vllm-args": vllm_args_command,
    "check": check_command,
    "doctor": doctor_command,
}
"""Commands by name, in the order of `codebook --help`, which shows the first sentence of each docstring on one line."""
MINIATURE_COMMANDS: dict[str, Callable[..., None]] = {
    "images": images_command,
    "train": train_command,
    "evaluate": evaluate_command,
}
"""Commands of `codebook miniature`."""

FIRST_STEPS = (
    "First steps: `codebook miniature images --out scenes`, then `codebook prune miniature --image scenes/000000.png "
    '--ask "read the number."`. `codebook COMMAND --help` explains a command.'
)
"""What `codebook --help` ends with."""

app = typer.Typer(
    name="codebook",
    no_args_is_help=True,
    epilog=FIRST_STEPS,
    rich_markup_mode=None,  # rich's three columns in a box take half as many lines again at 80, and cut words off
    pretty_exceptions_show_locals=False,
)


def show_version(asked: bool) -> None:
    """Print the version and end, if it is asked for."""
    if asked:
        print(f"codebook {__version__}")
        raise typer.Exit


@app.callback()
def global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Training-free visual-token pruning for vision-language models."""


for _name, _command in COMMANDS.items():
    app.command(_name)(with_quiet(_command))
_miniature = typer.Typer(
    help="Make scenes for the embedded model, train it, or test it.", no_args_is_help=True, rich_markup_mode=None
)
for _name, _command in MINIATURE_COMMANDS.items():
    _miniature.command(_name)(with_quiet(_command))
app.add_typer(_miniature, name="miniature")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; errors are one line on stderr, those of users with exit code 2."""
    # Read when torch loads its OpenMP: waiting threads would otherwise spin, and starve whatever shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    code = _run(argv)
    lost = flush_output()
    if lost is not None and not code:
        code = _fail_by_system(lost)
    if code:
        raise SystemExit(code)


def _run(argv: list[str] | None) -> int:
    """Run one command and report its error; the exit code."""
    try:
        prepare_streams()
        start_logging()
        # Outside its standalone mode, typer raises the errors that it would print over several lines.
        code = app(argv, prog_name="codebook", standalone_mode=False) or 0
    except (CodebookError, Interrupted) as error:
        return _fail(str(error), INTERRUPTED if isinstance(error, Interrupted) else USER_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SystemExit as ended:  # typer: with 0 of a shell that completes a line, with 1 of a broken pipe
        return BROKEN_PIPE if ended.code else 0
    except OSError as error:
        return _fail_by_system(error)
    except Exception as error:
        if hasattr(error, "format_message"):
            return _fail_by_usage(error)
        if sys.flags.dev_mode:
            raise
        return _fail_unexpectedly(error)
    return _fail("interrupted", code) if code == INTERRUPTED else int(code)


def _fail(message: str, code: int) -> int:
    say(f"error: {message}" if code != INTERRUPTED else message)
    return code


def _fail_by_system(error: OSError) -> int:
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE  # the reader of a pipe has left, as `head` does: there is nobody to tell
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "the output"
    return _fail(f"cannot use {name}: {error.strerror or error}; {remedy_for(error)}", USER_ERROR)


def _fail_by_usage(error: Exception) -> int:
    """Report an error of typer's about options."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return USER_ERROR
    context = getattr(error, "ctx", None)
    path = "codebook" if context is None else context.command_path
    return _fail(f"{error.format_message().rstrip('.')}; see `{path} --help`", USER_ERROR)  # type: ignore[attr-defined]


def _fail_unexpectedly(error: Exception) -> int:
    reason = named_line(error, 300)
    if out_of_memory(error):
        return _fail(f"out of memory ({reason}): choose a smaller --batch, or a larger --device", USER_ERROR)
    package = os.path.dirname(os.path.dirname(__file__))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)]
    where = f"{os.path.relpath(frames[-1].filename, package)}, line {frames[-1].lineno}"
    return _fail(
        f"unexpected {reason} ({where}): please report it with the output of `codebook doctor`; "
        "`python -X dev -m codebook.cli ...` shows the traceback",
        UNEXPECTED,
    )
