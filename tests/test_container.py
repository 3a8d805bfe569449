"""Dockerfile and compose.yaml: they can be read, and every path, option, extra and address that they name is there.

No test builds the image: that takes Docker, a network and minutes.
"""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from codebook.cli import app
from codebook.cli.serve import KEY
from codebook.serving.limits import KEYLESS, Limits

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = {"FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


@pytest.fixture(scope="module")
def instructions():
    """Instruction and argument of each line of the Dockerfile."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


@pytest.fixture(scope="module")
def service():
    return yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["codebook"]


def arguments(instructions, name):
    return [argument for found, argument in instructions if found == name]


def parsed(words):
    """The values of a `codebook` command line, as the command line itself parses them."""
    group = get_command(app)
    command = group.commands[words[0]]
    return command.make_context(words[0], list(words[1:])).params


def test_instructions_are_known_and_files_are_there(instructions):
    assert {name for name, _ in instructions} == INSTRUCTIONS
    assert arguments(instructions, "FROM") == ["python:3.11-slim"]
    copied = [word for argument in arguments(instructions, "COPY") for word in argument.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    assert allowed == set(copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    assert needed | set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]) <= set(copied)


def test_what_is_installed_is_a_part_of_the_project(instructions):
    [line] = [argument for argument in arguments(instructions, "RUN") if ".[" in argument]
    extras = set(re.search(r"\.\[([\w,]+)\]", line)[1].split(","))
    assert extras <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_it_runs_without_rights_and_is_asked_whether_it_lives(instructions, service):
    names = [name for name, _ in instructions]
    assert arguments(instructions, "USER") == ["codebook"]
    assert names.index("USER") < names.index("ENTRYPOINT")
    [health] = arguments(instructions, "HEALTHCHECK")
    check = json.loads(health.partition("CMD ")[2])
    compile(check[2], "healthcheck", "exec")
    port, path = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", check[2]).groups()
    assert path in KEYLESS and [port] == arguments(instructions, "EXPOSE")
    assert service["cap_drop"] == ["ALL"] and service["read_only"]


def test_the_commands_parse_and_meet_at_one_port(instructions, service):
    entry, default = (json.loads(arguments(instructions, name)[0]) for name in ("ENTRYPOINT", "CMD"))
    shown = re.search(r"docker run .* codebook (.*)", (ROOT / "Dockerfile").read_text())[1]
    for words in (default, service["command"], shlex.split(shown)):
        values = parsed([*entry[1:], *words])
        assert values["model"] == "miniature" and values["host"] == "0.0.0.0"
        assert [str(values["port"])] == arguments(instructions, "EXPOSE")
        assert service["ports"] == [f"127.0.0.1:{values['port']}:{values['port']}"]


def test_compose_names_what_is_there(instructions, service):
    assert (ROOT / service["build"] / "Dockerfile").is_file()
    [home] = [argument for argument in arguments(instructions, "WORKDIR") if argument.startswith("/home")]
    [volume] = service["volumes"]
    assert volume.partition(":")[2] == f"{home}/.cache"  # of models, and of codebooks
    assert list(service["environment"]) == [KEY]
    assert int(service["stop_grace_period"].removesuffix("s")) > Limits().drain_seconds
