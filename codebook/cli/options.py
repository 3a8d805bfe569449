"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from codebook.errors import CodebookError

ModelOption = Annotated[str, typer.Argument(help="`miniature`, `eyes`, a folder, or a name on the Hugging Face Hub.")]
NamedModelOption = Annotated[
    str | None,
    typer.Option("--model", help="The model that it was built for; default: the one it names, if that ships."),
]
CodebookOption = Annotated[
    Path | None, typer.Option(help="Folder of a codebook, or a name that `codebook list` shows; default: the model's.")
]
PullOption = Annotated[bool, typer.Option("--pull", help="Fetch the codebook if it is not on this machine.")]
RecipeOption = Annotated[
    Path | None, typer.Option(help="Folder that `codebook tune` wrote, with the schedule and the codebook to use.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print results and errors only.")]
DeviceOption = Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
QuestionOption = Annotated[str, typer.Option("--ask", help="The question.")]
NewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
MethodsOption = Annotated[
    str, typer.Option(help="Methods, presets, hybrids or schedule files, separated by commas (see `codebook list`).")
]

DataOption = Annotated[
    str,
    typer.Option(help="`miniature`, or JSONL of {image | images, question, answer, task}; the last two are optional."),
]
CountOption = Annotated[int, typer.Option(min=1, help="Samples per task family, with --data miniature.")]

ImagesOption = Annotated[
    Path, typer.Option(help="Folder of images, JSONL list, .tar shard or folder of them, or saved data set.")
]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: float32 on the CPU.")]
AddressOption = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster; default: start one on this machine.")
]


@dataclass(frozen=True)
class Probing:
    """Where and how images are probed: the options that `build`, `extend` and `tune` share."""

    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many images, the first by name.")] = None
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences per forward pass; default: chosen automatically.")
    ] = None
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")] = False
    device: DeviceOption = None
    dtype: DtypeOption = None
    engine: Annotated[str, typer.Option(help="Where images are probed: local, or ray.")] = "local"
    address: AddressOption = None
    workers: Annotated[int, typer.Option(min=1, help="Ray actors, each with its own copy of the model.")] = 2

    def __post_init__(self) -> None:
        if self.engine not in ("local", "ray"):
            raise CodebookError(f"no engine {self.engine!r}: use local or ray")


def with_quiet(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the option --quiet, which every command has."""

    @functools.wraps(command)
    def wrapped(*args: Any, quiet: bool, **given: Any) -> None:
        if quiet:
            logging.getLogger("codebook").setLevel(logging.ERROR)
        command(*args, **given)

    own = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=QuietOption)
    return _signed(wrapped, [*own.parameters.values(), option])


def with_probing(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a command that takes `probing`: on the command line its fields stand there as options."""
    hints = get_type_hints(Probing, include_extras=True)
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Probing)
    ]

    @functools.wraps(command)
    def wrapped(*args: Any, **given: Any) -> None:
        command(
            *args,
            probing=Probing(**{option.name: given.pop(option.name, option.default) for option in options}),
            **given,
        )

    own = inspect.signature(command, eval_str=True)
    rest = [parameter for name, parameter in own.parameters.items() if name != "probing"]
    return _signed(wrapped, [*rest, *options])


def _signed(wrapped: Callable[..., None], options: list[inspect.Parameter]) -> Callable[..., None]:
    """A command whose options, for the command line, are these."""
    options = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in options]
    wrapped.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in options}
    return wrapped
