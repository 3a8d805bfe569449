"""`codebook vllm-args`: the arguments with which vLLM prunes; and vLLM's own server behind `codebook serve`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codebook.cli.options import CodebookOption, JsonOption, ModelOption, PullOption
from codebook.cli.output import note
from codebook.errors import CodebookError
from codebook.pruning.presets import DEFAULT

if TYPE_CHECKING:
    from codebook.integrations.vllm.launch import Launch

SERVER = "vllm.entrypoints.openai.api_server"
"""vLLM's own server, which `vllm serve` runs too."""
NO_HOST = "data-urls-only.invalid"
"""A host that no address can have (RFC 2606): vLLM fetches from everywhere unless it is told from where."""

REDIRECTS = "VLLM_MEDIA_URL_ALLOW_REDIRECTS"
"""vLLM's variable by which it goes, or does not go, where a host sends it: to addresses that were not allowed."""


def vllm_args_command(
    model: ModelOption,
    method: Annotated[
        str, typer.Option(help="A method that needs projector outputs alone; `seeded-middle` runs without its mass.")
    ] = DEFAULT,
    keep: Annotated[float, typer.Option(help="Visual tokens kept of each image, as a fraction in (0, 1].")] = 0.2,
    codebook: CodebookOption = None,
    pull: PullOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print the arguments with which vLLM prunes a model.

    With --json, the value of --hf-overrides alone.
    """
    launch = _launch(model, method, keep, codebook, pull)
    print(launch.json if as_json else shlex.join(["--model", launch.model, "--hf-overrides", launch.json]))


def serve_on_vllm(
    model: str,
    method: str,
    keep: float,
    codebook: Path | None,
    pull: bool,
    *,
    host: str,
    port: int,
    dtype: str | None,
    hosts: Sequence[str],
    api_key: str | None,
    more: str,
) -> None:
    """Become vLLM's own server, in this very process."""
    if find_spec("vllm") is None:
        raise CodebookError("--engine vllm needs vLLM: run `pip install vllm`, or use another engine")
    if ported := [name for name in hosts if ":" in name]:
        raise CodebookError(f"vLLM tells hosts apart by their names alone: write {ported[0]} without its port")
    launch = _launch(model, method, keep, codebook, pull)
    words = [
        "--model", launch.model, "--served-model-name", model, "--hf-overrides", launch.json,
        "--host", host, "--port", str(port), "--dtype", dtype or "auto",
        "--allowed-media-domains", *(hosts or [NO_HOST]),
    ]  # fmt: skip
    os.environ.setdefault(REDIRECTS, "0")
    if api_key:
        os.environ["VLLM_API_KEY"] = api_key  # as an argument, every user of the machine would see it
    note(f"vLLM's own server, pruned: {model}, {launch.overrides['codebook_config']}")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", SERVER, *words, *shlex.split(more)])


def _launch(model: str, method: str, keep: float, codebook: Path | None, pull: bool) -> Launch:
    from codebook.cli.checks import check_codebook

    check_codebook(codebook, model, pull)
    from codebook.integrations.vllm.launch import Launch

    launch = Launch.of(model, method, keep, codebook)
    if launch.without_mass:
        plain = launch.overrides["codebook_config"]["method"]
        note(f"{method} without mass-preserving attention, which vLLM's attention cannot do: {plain}")
    return launch
