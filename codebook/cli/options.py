"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[str, typer.Argument(help="`miniature`, a folder, or a name on the Hugging Face Hub.")]
NamedModelOption = Annotated[
    str | None,
    typer.Option("--model", help="The model that it was built for; default: the one it names, if that ships."),
]
CodebookOption = Annotated[
    Path | None, typer.Option(help="Folder of a codebook, or a name that `codebook list` shows; default: the model's.")
]
PullOption = Annotated[bool, typer.Option("--pull", help="Fetch the codebook if it is not on this machine.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
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
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use at most this many images, the first by name.")]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Sequences per forward pass; default: chosen automatically.")
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: float32 on the CPU.")]
EngineOption = Annotated[str, typer.Option(help="Where images are probed: local, or ray.")]
AddressOption = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster; default: start one on this machine.")
]
WorkersOption = Annotated[int, typer.Option(min=1, help="Ray actors, each with its own copy of the model.")]
