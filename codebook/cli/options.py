"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from codebook.cli.output import hide_hub_bars
from codebook.errors import CodebookError, unknown

if TYPE_CHECKING:
    from codebook.models.base import Model, Processor
    from codebook.store.clips import FrameRule

MODEL = "`miniature`, `eyes`, a folder, or a name on the Hugging Face Hub"
ModelOption = Annotated[str, typer.Argument(help=f"{MODEL}.")]
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
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda if there is one.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
KeepOption = Annotated[float, typer.Option(help="Visual tokens kept, averaged over the layers, in (0, 1].")]
ScheduleKeepOption = Annotated[
    float | None,
    typer.Option(help="Visual tokens kept, averaged over the layers, in (0, 1]; default: the schedule's, or 0.2."),
]
QuestionOption = Annotated[str, typer.Option("--ask", help="The question.")]
NewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
MethodsOption = Annotated[
    str, typer.Option(help="Methods, presets, hybrids or schedule files, separated by commas (see `codebook list`).")
]

DATA = "`miniature`, miniature:FAMILY, or JSONL of {image|images|video, question, answer, task}, the last two optional."
DataOption = Annotated[str, typer.Option(help=DATA)]
SecondsOption = Annotated[
    float, typer.Option(min=0, max=1e9, help="Seconds to spend on timing; at least three rounds are run.")
]

ImagesOption = Annotated[
    Path, typer.Option(help="Folder of images, JSONL list, .tar shard or folder of them, or saved data set.")
]
FirstOption = Annotated[
    list[str] | None, typer.Option(help="Another method to try as the first stage; repeat for several.")
]
PilotOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images of the pilot that finds the thresholds; default: 32, or no pilot for a model with published ones.",
    ),
]
SelectOption = Annotated[
    float | None, typer.Option(help="Share of the probed tokens that pass the pilot's thresholds; default: 0.03.")
]
PromptOption = Annotated[str | None, typer.Option(help="Question of every probe; default: to describe the image.")]
AddressOption = Annotated[
    str | None, typer.Option(help="With --engine ray: address of a cluster; default: start one on this machine.")
]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded: the options of every command that takes any model."""

    device: DeviceOption = None
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16, or auto, the checkpoint's; default: float32 on CPUs."),
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(help="Instead of --device: auto, and accelerate puts the model where it fits."),
    ] = None
    attn: Annotated[
        str | None, typer.Option(help="Attention kernel: sdpa (default), eager, or flex_attention on CUDA.")
    ] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hugging Face Hub.")] = (
        None
    )

    def given(self) -> dict[str, str]:
        """The options that were given, by their names on the command line."""
        return {f"--{name.replace('_', '-')}": value for name, value in vars(self).items() if value is not None}

    def arguments(self) -> dict[str, str]:
        """Those as keyword arguments of `codebook.load`."""
        names = {"attn": "attn_implementation"}
        return {names.get(name, name): value for name, value in vars(self).items() if value is not None}

    def check(self, model: str) -> str:
        """The device; refuses what can be known to fail before the model is loaded.

        Raises
        ------
        CodebookError
            If there is no such device, dtype or attention kernel, or an option does not go with the model or another.
        """
        from codebook.models.loading import check_loading
        from codebook.pruning.engine.kernels import check_attention

        device = check_loading(model, **self.arguments())
        if self.attn is not None:
            check_attention(self.attn, device.partition(":")[0])
        return device

    def load(self, model: str) -> tuple[Model, Processor]:
        """Load a model, as `codebook.load` does."""
        from codebook.models.loading import load

        return load(model, **self.arguments())

    def frame_rule(self, model: str) -> FrameRule:
        """The rule that chooses the frames of clips for a model, before it is loaded: that of the same revision."""
        from codebook.inference.frames import frame_rule_of

        return frame_rule_of(model, **self.arguments())


@dataclass(frozen=True)
class Probing:
    """Where and how images are probed: the options that `build`, `extend` and `tune` share."""

    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many images, the first by name.")] = None
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences per forward pass; default: chosen automatically.")
    ] = None
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")] = False
    engine: Annotated[str, typer.Option(help="Where images are probed: local or ray.")] = "local"
    address: AddressOption = None
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="With --engine ray: actors, each with its own copy of the model; default: 2."),
    ] = None

    def __post_init__(self) -> None:
        if self.engine not in ("local", "ray"):
            raise unknown("no engine", self.engine, ("local", "ray"))
        if self.engine == "local" and (self.workers is not None or self.address is not None):
            raise CodebookError("--workers and --address are Ray's: add --engine ray, or leave them out")


def with_quiet(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the option --quiet, which every command has."""

    @functools.wraps(command)
    def wrapped(*args: Any, quiet: bool, **given: Any) -> None:
        if quiet:
            logging.getLogger("codebook").setLevel(logging.ERROR)
            hide_hub_bars()  # of a model, data or a codebook on the Hub
        command(*args, **given)

    own = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=QuietOption)
    return _signed(wrapped, [*own.parameters.values(), option])


OPTION_GROUPS = (Probing, Loading)
"""Dataclasses whose fields are options of the commands that take one of them."""


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a command with parameters of `OPTION_GROUPS`: on the command line their fields are its options."""
    own = inspect.signature(command, eval_str=True)
    groups = {name: one.annotation for name, one in own.parameters.items() if one.annotation in OPTION_GROUPS}
    parameters = [parameter for name, parameter in own.parameters.items() if name not in groups]
    for group in groups.values():
        hints = get_type_hints(group, include_extras=True)
        for field in fields(group):
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
                )
            )

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group) if field.name in given})
            for name, group in groups.items()
        }
        command(**given, **made)

    return _signed(wrapped, parameters)


def path(text: str | Path) -> Path:
    """A path of the command line. An empty one, as of a variable that is not set, is not the folder that we are in."""
    if not str(text):
        raise typer.BadParameter("the path is empty: name one")
    return Path(text)


def _names_paths(kind: Any) -> bool:
    """Whether a type is `Path`, or has it inside, as a list of paths has."""
    return kind is Path or any(map(_names_paths, get_args(kind)))


def _signed(wrapped: Callable[..., None], options: list[inspect.Parameter]) -> Callable[..., None]:
    """A command whose options, for the command line, are these."""
    for parameter in options:
        kind, described = get_args(parameter.annotation)
        if _names_paths(kind):
            described.parser = path
    options = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in options]
    wrapped.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in options}
    return wrapped
