"""What `--help` says of every command fits 80 columns, and none of it is cut off."""

from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from codebook.cli import app


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[Any]:
    yield pytest.param(path, group, id=" ".join(path) or "codebook")
    for name, one in getattr(group, "commands", {}).items():
        yield from commands(one, (*path, name))


@pytest.mark.parametrize("path, command", [*commands(get_command(app))])
def test_help(path, command):
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    usage, *lines = shown.output.splitlines()
    assert usage.startswith("Usage: ") and lines
    # A command's line in a list of commands ends in three dots where its first sentence is too long.
    assert not [line for line in lines if len(line) > 80 or line.rstrip().endswith(("...", "…"))]
    for option in command.params:
        assert option.help and option.help.endswith("."), option.name
        said = "default" in option.help.lower()
        assert not (said and option.default not in (None, False)), f"{option.name}: typer says its default too"
