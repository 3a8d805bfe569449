"""`codebook serve`: a model that answers over HTTP, pruned, in OpenAI's API."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from codebook.cli.options import CodebookOption, DeviceOption, DtypeOption, ModelOption, SeedOption
from codebook.cli.output import note
from codebook.errors import CodebookError

NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client")
"""Packages of the extra `serve`."""
KEY = "CODEBOOK_API_KEY"
"""Environment variable with the key that clients must send."""


def serve_command(
    model: ModelOption,
    keep: Annotated[
        float | None,
        typer.Option(help="Visual tokens kept, averaged over the layers, in (0, 1]; default: the schedule's, or 0.2."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", "--method", help="As in `codebook prune`: `seeded` (default), or another."),
    ] = None,
    codebook: CodebookOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine only with an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8000,
    limit: Annotated[
        list[str] | None, typer.Option("--limit", help="A limit as NAME=VALUE (see docs/serving.md); repeat for more.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File with the key that clients must send; default: ${KEY}, or no key.")
    ] = None,
) -> None:
    """Answer chat completions over HTTP with most visual tokens dropped."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise CodebookError(f"serving needs {', '.join(missing)}: run `pip install 'codebook[serve]'`")
    from codebook.serving.limits import read_limits

    limits = read_limits(limit or [])
    key = _api_key(api_key_file)
    from codebook.pruning.plan import Plan
    from codebook.pruning.presets import DEFAULT

    plan = Plan(schedule or DEFAULT, keep, None, codebook, seed)
    from codebook.cli.checks import check_codebook_folder, check_dtype
    from codebook.models.loading import check_device, load

    check_codebook_folder(codebook)
    check_device(device)
    check_dtype(dtype)

    import torch

    from codebook.serving import stock  # noqa: F401  a transformers that lacks something is refused here
    from codebook.serving.metrics import Metrics
    from codebook.serving.model_thread import ModelThread
    from codebook.serving.server import Server, address, listen
    from codebook.serving.state import State

    bound = listen(host, port)  # before the model is loaded, which takes long
    loaded, processor = load(model, device, None if dtype is None else getattr(torch, dtype))
    applied, metrics = plan.apply(loaded), Metrics()
    thread = ModelThread(loaded, processor, applied, metrics)
    name = Path(model).name if Path(model).is_dir() else model
    state = State(name, loaded, processor, applied, thread, metrics, limits, key)
    server = Server(state, ready=lambda: note(f"{name} under {applied}: {address(bound)}/v1"))
    server.run([bound])
    thread.stop()
    if server.cut:
        raise CodebookError(
            f"{server.cut} requests were cut off: they took longer than drain_seconds; raise that limit"
        )


def _api_key(file: Path | None) -> str | None:
    from codebook.store.files import read_bytes

    key = os.environ.get(KEY, "") if file is None else read_bytes(file, 4096).decode(errors="replace")
    key = key.strip()
    if file is not None and not key:
        raise CodebookError(f"{file} holds no key: write one into it")
    return key or None
