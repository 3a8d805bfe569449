"""`codebook serve`: a model that answers over HTTP, pruned, in OpenAI's API."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codebook.cli.options import DeviceOption, DtypeOption, PullOption, SeedOption
from codebook.cli.output import note
from codebook.errors import CodebookError

if TYPE_CHECKING:
    from codebook.serving.state import State

NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client")
"""Packages of the extra `serve`."""
KEY = "CODEBOOK_API_KEY"
"""Environment variable with the key that clients must send."""


def serve_command(
    model: Annotated[
        str | None, typer.Argument(help="`miniature`, a folder, or a hub name; none to serve codebooks alone.")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Visual tokens kept, averaged over the layers, in (0, 1]; default: the schedule's, or 0.2."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", "--method", help="As in `codebook prune`: `seeded` (default), or another."),
    ] = None,
    codebook: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=DIR: a codebook that features are scored against, by its name; repeat for more. DIR alone is "
            "scored under the folder's name, and MODEL's schedule prunes with it; default: the model's. DIR may be a "
            "name that `codebook list` shows."
        ),
    ] = None,
    pull: PullOption = False,
    seed: SeedOption = 0,
    engine: Annotated[str, typer.Option(help="What runs the model: transformers.")] = "transformers",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; default: this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8000,
    limit: Annotated[
        list[str] | None, typer.Option("--limit", help="A limit as NAME=VALUE (see docs/serving.md); repeat for more.")
    ] = None,
    allow_urls: Annotated[
        list[str] | None,
        typer.Option("--allow-urls", help="Host whose images are fetched; repeat for more. Default: data URLs only."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File with the key that clients must send; default: ${KEY}, or no key.")
    ] = None,
) -> None:
    """Answer chat completions over HTTP with most visual tokens dropped, and score features against codebooks."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise CodebookError(f"serving needs {', '.join(missing)}: run `pip install 'codebook[serve]'`")
    if engine != "transformers":
        raise CodebookError(f"no engine {engine!r}: use transformers")
    from codebook.serving.limits import read_limits

    limits = read_limits(limit or [])
    from codebook.serving.pictures import read_hosts

    hosts = read_hosts(allow_urls or [])
    key = _api_key(api_key_file)
    from codebook.cli.checks import check_codebook, check_dtype
    from codebook.serving.shelf import named_folders

    books, unnamed = named_folders(codebook or [])
    for book in books.values() or [None]:
        check_codebook(book, model, pull)
    shared: dict[str, Any] = {"limits": limits, "api_key": key}
    if model is None:
        _refuse_without_model({
            "--keep": keep, "--schedule": schedule, "--device": device, "--dtype": dtype, "--allow-urls": allow_urls,
        })  # fmt: skip
        if not books:
            raise CodebookError("name a model to answer with, or codebooks to score against: --codebook NAME=DIR")
        _serve_codebooks(books, host, port, shared)
        return
    if len(unnamed) > 1:
        raise CodebookError(
            f"the schedule prunes with one codebook, and {len(unnamed)} came without a name: write NAME=DIR for those "
            "that are scored against only"
        )
    from codebook.pruning.plan import Plan
    from codebook.pruning.presets import DEFAULT

    plan = Plan(schedule or DEFAULT, keep, None, next(iter(unnamed), None), seed)
    from codebook.models.loading import check_device, load

    check_device(device)
    check_dtype(dtype)

    import torch

    from codebook.serving import stock  # noqa: F401  a transformers that lacks something is refused here
    from codebook.serving.metrics import Metrics
    from codebook.serving.model_thread import ModelThread
    from codebook.serving.server import address, is_local, listen
    from codebook.serving.shelf import Shelf
    from codebook.serving.state import ModelState
    from codebook.store.files import is_folder

    bound = listen(host, port)  # before the model is loaded, which takes long
    shelf = Shelf(books)
    loaded, processor = load(model, device, None if dtype is None else getattr(torch, dtype))
    applied, metrics = plan.apply(loaded), Metrics()
    metrics.describe(applied, plan.keep)
    thread = ModelThread(loaded, processor, applied, metrics)
    name = Path(model).resolve().name if is_folder(Path(model)) else model
    state = ModelState(
        name=name, model=loaded, processor=processor, schedule=applied, model_thread=thread, metrics=metrics,
        shelf=shelf, codebook=plan.codebook, seed=seed, examples=_examples(model), allowed_hosts=hosts,
        local=is_local(bound), **shared,
    )  # fmt: skip
    try:
        _serve(state, bound, f"{name} under {applied}: {address(bound)}/v1; page: {address(bound)}")
    finally:
        thread.stop()


def _serve_codebooks(books: dict[str, Path], host: str, port: int, shared: dict[str, Any]) -> None:
    """Serve scores alone, without a model."""
    from codebook.serving.metrics import Metrics
    from codebook.serving.server import address, is_local, listen
    from codebook.serving.shelf import Shelf
    from codebook.serving.state import State

    shelf, bound = Shelf(books), listen(host, port)
    state = State(metrics=Metrics(), shelf=shelf, local=is_local(bound), **shared)
    _serve(state, bound, f"codebooks {shelf.names()}: {address(bound)}/v1/codebooks")


def _serve(state: State, bound: socket, greeting: str) -> None:
    """Serve until told to end."""
    from codebook.serving.server import Server

    if state.api_key is None and not state.local:
        note(f"no API key: whoever reaches this address can ask; set one by --api-key-file or {KEY}")
    server = Server(state, ready=lambda: note(greeting), say=note)
    server.run([bound])
    if server.cut:
        raise CodebookError(f"{server.cut} requests were cut off after drain_seconds: raise that limit")


def _refuse_without_model(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise CodebookError(f"{name} needs a MODEL: name one, or leave {name} out")


def _examples(model: str) -> tuple[dict[str, str], ...]:
    """Pictures for the page that the model can read, where it can read only such ones."""
    if model != "miniature":
        return ()
    from codebook.miniature.examples import examples

    return examples()


def _api_key(file: Path | None) -> str | None:
    from codebook.store.files import read_bytes

    key = os.environ.get(KEY, "") if file is None else read_bytes(file, 4096).decode(errors="replace")
    key = key.strip()
    if file is not None and not key:
        raise CodebookError(f"{file} holds no key: write one into it")
    return key or None
