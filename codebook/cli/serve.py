"""`codebook serve`: a model that answers over HTTP, pruned, in OpenAI's API."""

from __future__ import annotations

import gc
import os
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codebook.cli.options import (
    MODEL,
    AddressOption,
    Loading,
    PullOption,
    RecipeOption,
    ScheduleKeepOption,
    SeedOption,
    with_groups,
)
from codebook.cli.output import note
from codebook.errors import CodebookError, install_command

if TYPE_CHECKING:
    from codebook.serving.blueprint import Blueprint

NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client")
"""Packages of the extra `serve`."""
TRANSFORMERS, RAY, VLLM = "transformers", "ray", "vllm"
"""Engines."""
KEY = "CODEBOOK_API_KEY"
"""Environment variable with the key that clients must send."""


@with_groups
def serve_command(
    loading: Loading,
    model: Annotated[str | None, typer.Argument(help=f"{MODEL}; none to serve codebooks alone.")] = None,
    keep: ScheduleKeepOption = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", "--method", help="As in `codebook prune`: `seeded-middle` (default), or another."),
    ] = None,
    codebook: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=DIR: a codebook that features are scored against, by its name; repeat for more. DIR alone is "
            "scored under the folder's name, and MODEL's schedule prunes with it; default: the model's. DIR may be a "
            "name that `codebook list` shows."
        ),
    ] = None,
    recipe: RecipeOption = None,
    pull: PullOption = False,
    seed: SeedOption = 0,
    engine: Annotated[
        str, typer.Option(help="What runs the service: transformers, ray, with replicas, or vllm, its own server.")
    ] = TRANSFORMERS,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="With --engine ray: replicas, each with its own copy of the model; default: 1."),
    ] = None,
    address: AddressOption = None,
    engine_args: Annotated[
        str | None,
        typer.Option(help="With --engine vllm: more of its server's arguments, as in '--max-model-len 4096'."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 127.0.0.1 is reached from this machine only.")
    ] = "127.0.0.1",
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
    """Serve a pruned model over HTTP, in OpenAI's chat API.

    It also scores features against codebooks (--codebook NAME=DIR), and has a page for the browser.
    """
    _check_engine(engine, replicas, address, engine_args)
    if engine == VLLM:
        _refuse_on_vllm({
            "--recipe": recipe, "--seed": seed or None, "--limit": limit, **loading.given(), "--dtype": None,
        })  # fmt: skip
        if model is None:
            raise CodebookError(f"--engine {VLLM} needs a MODEL: name one, or score features with another engine")
        _serve_on_vllm(
            model, schedule, keep, codebook or [], pull, host, port, loading.dtype, allow_urls or [], api_key_file,
            engine_args,
        )  # fmt: skip
        return
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise CodebookError(f"serving needs {', '.join(missing)}: run `{install_command('serve')}`")
    from codebook.serving.limits import read_limits
    from codebook.serving.pictures import read_hosts

    limits, hosts, key = read_limits(limit or []), read_hosts(allow_urls or []), _api_key(api_key_file)
    from codebook.pruning.plan import Plan  # torch: what is wrong above is said at once
    from codebook.pruning.presets import DEFAULT
    from codebook.serving.blueprint import Blueprint
    from codebook.serving.server import is_local, listen

    if recipe is not None:
        from codebook.cli.recipe import recipe_parts

        schedule, own = recipe_parts(recipe, schedule, None)
        codebook = [*(codebook or []), str(own)]
    books, pruning_book = _checked_codebooks(codebook or [], model, pull)
    if model is None:
        _refuse_without_model({
            "--keep": keep, "--schedule": schedule, "--allow-urls": allow_urls, **loading.given(),
        })  # fmt: skip
        if not books:
            raise CodebookError("name a model to answer with, or codebooks to score against: --codebook NAME=DIR")
        plan = None
    else:
        from codebook.serving import stock  # noqa: F401  a transformers that lacks something is refused here

        plan = Plan(DEFAULT if schedule is None else schedule, keep, None, pruning_book, seed)
        loading.check(model)
    bound = listen(host, port)  # before the model is loaded, which takes long
    shared = {"limits": limits, "api_key": key, "allowed_hosts": hosts, "local": is_local(bound)}
    blueprint = Blueprint(
        model=model, plan=plan, books=books, loading=loading.arguments(), shared=shared, examples=_examples(model)
    )
    if key is None and not is_local(bound):
        note(f"no API key: whoever reaches this address can ask; set one by --api-key-file or {KEY}")
    if engine == RAY:
        _serve_on_ray(blueprint, bound, replicas or 1, address)
    else:
        _serve(blueprint, bound)


def _checked_codebooks(given: list[str], model: str | None, pull: bool) -> tuple[dict[str, Path], Path | None]:
    """The codebooks that features are scored against, by their names, and the one that the schedule prunes with."""
    from codebook.cli.checks import check_codebook
    from codebook.serving.shelf import named_folders

    books, unnamed = named_folders(given)
    for book in books.values() or [None]:
        check_codebook(book, model, pull)
    if len(unnamed) > 1 and model is not None:
        raise CodebookError(
            f"the schedule prunes with one codebook, and {len(unnamed)} came without a name: write NAME=DIR for those "
            "that are scored against only"
        )
    return books, next(iter(unnamed), None)


def _serve(blueprint: Blueprint, bound: socket) -> None:
    """Serve until told to end, in this process."""
    from codebook.serving.server import Server, address
    from codebook.serving.state import ModelState

    state = blueprint.make()
    title = (
        f"{state.name} under {state.schedule}" if isinstance(state, ModelState) else f"codebooks {state.shelf.names()}"
    )
    server = Server(state, ready=lambda: _greet(title, blueprint, address(bound)), say=note)
    # What stays for good is not looked at again, so that rings of objects that a request leaves are found soon.
    gc.collect()
    gc.freeze()
    try:
        server.run([bound])
    finally:
        if isinstance(state, ModelState):
            state.model_thread.stop()
    if server.cut:
        raise CodebookError(f"{server.cut} requests were cut off after drain_seconds: raise that limit")


def _serve_on_ray(blueprint: Blueprint, bound: socket, replicas: int, cluster: str | None) -> None:
    """Serve until told to end, in replicas of Ray's."""
    from codebook.models.loading import check_loading
    from codebook.serving.on_ray import serve_on_ray
    from codebook.serving.server import address

    (host, port), url = bound.getsockname()[:2], address(bound)
    bound.close()  # it was free; Ray's own processes will listen
    gpus = 1 if blueprint.model and check_loading(blueprint.model, **blueprint.loading).startswith("cuda") else 0
    title = f"{replicas} replicas of {blueprint.model or 'the codebooks'} on Ray"
    note(f"starting {title}")
    serve_on_ray(blueprint, replicas, host, port, cluster, gpus, ready=lambda: _greet(title, blueprint, url))


def _greet(title: str, blueprint: Blueprint, url: str) -> None:
    if blueprint.model is not None:
        note(f"page: {url}")
    note(f"{title}: {url}/v1")


def _serve_on_vllm(
    model: str,
    method: str | None,
    keep: float | None,
    codebooks: list[str],
    pull: bool,
    host: str,
    port: int,
    dtype: str | None,
    allow_urls: list[str],
    api_key_file: Path | None,
    engine_args: str | None,
) -> None:
    """Become vLLM's own server."""
    from codebook.cli.vllm import serve_on_vllm
    from codebook.models.loading import check_dtype
    from codebook.pruning.presets import DEFAULT, KEEP
    from codebook.serving.pictures import read_hosts

    if len(codebooks) > 1 or any("=" in text for text in codebooks):
        raise CodebookError(f"--engine {VLLM} prunes with one codebook and scores none: write --codebook DIR, once")
    check_dtype(dtype)
    serve_on_vllm(
        model, DEFAULT if method is None else method, KEEP if keep is None else keep,
        Path(codebooks[0]) if codebooks else None, pull,
        host=host, port=port, dtype=dtype, hosts=read_hosts(allow_urls), api_key=_api_key(api_key_file),
        more=engine_args or "",
    )  # fmt: skip


def _refuse_on_vllm(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise CodebookError(f"{name} is not for --engine {VLLM}: leave it out; --engine-args takes vLLM's own")


def _check_engine(engine: str, replicas: int | None, address: str | None, engine_args: str | None) -> None:
    if engine not in (TRANSFORMERS, RAY, VLLM):
        raise CodebookError(f"no engine {engine!r}: use {TRANSFORMERS}, {RAY} or {VLLM}")
    if engine_args is not None and engine != VLLM:
        raise CodebookError(f"--engine-args are vLLM's: add --engine {VLLM}, or leave them out")
    if engine == RAY:
        from codebook.serving.on_ray import check_ray

        check_ray()
    elif replicas is not None or address is not None:
        raise CodebookError(f"--replicas and --address are Ray's: add --engine {RAY}, or leave them out")


def _refuse_without_model(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise CodebookError(f"{name} needs a MODEL: name one, or leave {name} out")


def _examples(model: str | None) -> tuple[dict[str, str], ...]:
    """Pictures for the page that the model can read, where it can read only such ones."""
    from codebook.models import SHIPPED_MODELS

    if model not in SHIPPED_MODELS:
        return ()
    from codebook.miniature.examples import examples

    return examples()


def _api_key(file: Path | None) -> str | None:
    from codebook.store.reading import read_bytes

    key = os.environ.get(KEY, "") if file is None else read_bytes(file, 4096).decode(errors="surrogateescape")
    key = key.strip()
    if file is not None and not key:
        raise CodebookError(f"{file} holds no key: write one into it")
    if not key.isprintable():
        raise CodebookError(f"{file or KEY} holds a key that no client can send: write one line of text")
    return key or None
