"""`codebook doctor`: what is installed, what is missing and what it means, on one screen."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from codebook import __version__
from codebook.cli.options import JsonOption
from codebook.errors import DISTRIBUTION, counted, install_command, named_line

MODULES = {"pillow": "PIL"}
"""Modules that are not named as their distributions are."""
FAISS_WHEELS = ("faiss", "faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")
"""Distributions that all install the one folder `faiss`."""
TESTING = "test"
"""Extra of contributors; it is not listed."""


def doctor_command(as_json: JsonOption = False) -> None:
    """Show what is installed, what is missing and what clashes."""
    report = examine()
    print(json.dumps(report) if as_json else _screen(report))


def examine() -> dict[str, Any]:
    """The state of this installation; never raises, whatever is missing or broken."""
    warnings: list[str] = []
    required, extras = _requirements(warnings)
    packages = {name: _version(name) for name in required}
    modules = {name: _module(warnings, name) for name, version in packages.items() if version}
    torch = modules.get("torch")
    return {
        "codebook": __version__,
        "folder": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages | {"torchvision": _torchvision(warnings, torch)},
        "faiss": _faiss(warnings),
        "devices": _attempt(warnings, "the list of devices", lambda: _devices(torch, warnings), []),
        "attention": _attempt(warnings, "the list of attention kernels", lambda: _attention(torch), []),
        "extras": extras,
        "codebooks": _attempt(warnings, "the list of shipped codebooks", _shipped_codebooks, []),
        "warnings": warnings,
    }


def _attempt(warnings: list[str], what: str, get: Callable[[], Any], otherwise: Any = None) -> Any:
    """What `get` returns. Anything may be broken here, so any failure becomes a warning."""
    try:
        return get()
    except Exception as error:
        warnings.append(f"{what} does not load ({named_line(error, 160)})")
        return otherwise


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _module(warnings: list[str], name: str) -> Any:
    """The imported package; what is installed may still be broken."""
    module = MODULES.get(name, name.replace("-", "_"))
    return _attempt(warnings, f"{name} {_version(name)}", lambda: import_module(module))


def _requirements(warnings: list[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Names of the required packages, and by extra whether it is installed and how to install it."""
    try:
        from packaging.requirements import Requirement

        distribution = metadata.distribution(DISTRIBUTION)
        needed = [Requirement(text) for text in distribution.requires or ()]
        named = sorted(set(distribution.metadata.get_all("Provides-Extra") or ()) - {TESTING})
    except (ImportError, metadata.PackageNotFoundError) as error:
        warnings.append(f"requirements are not known ({error}): install it by pip")
        return [], {}

    def unmet(requirement: Requirement) -> str | None:
        version = _version(requirement.name)
        if version is None:
            return f"{requirement.name} is missing"
        if not requirement.specifier.contains(version, prereleases=True):
            return f"{requirement.name} is {version}, not {requirement.specifier}"
        return None

    required = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    warnings.extend(
        f"{problem}: pip install '{one.name}{one.specifier}'" for one in required if (problem := unmet(one))
    )
    extras: dict[str, dict[str, Any]] = {}
    for extra in named:
        own = [one for one in needed if one not in required and one.marker and one.marker.evaluate({"extra": extra})]
        problems = [problem for one in own if (problem := unmet(one))]
        # Both wheels own the folder faiss/: the other one has to go first.
        others = [name for name in FAISS_WHEELS if _version(name)] if extra in ("cpu", "gpu") else []
        instead = f"pip uninstall {' '.join(others)}; " if others else ""
        extras[extra] = {
            "installed": not problems,
            "problems": problems,
            "install": f"{instead}{install_command(extra)}",
        }
    return sorted(one.name for one in required), extras


def _torchvision(warnings: list[str], torch: Any) -> str | None:
    version = _version("torchvision")
    goes_with = f"the one that goes with torch {torch.__version__.split('+')[0]}" if torch else "torch first"
    if version is None:
        warnings.append(
            "torchvision is missing: the processors of Qwen-VL and LLaVA-OneVision and all video processors need it; "
            f"install {goes_with}"
        )
    elif torch:
        _module(warnings, "torchvision")
    return version


def _faiss(warnings: list[str]) -> dict[str, Any]:
    """Which wheels are there, and whether the one that won is built for GPUs."""
    wheels = {name: version for name in FAISS_WHEELS if (version := _version(name))}
    if len(wheels) > 1:
        warnings.append(
            f"{' and '.join(wheels)} overwrite each other: pip uninstall {' '.join(wheels)}, then install one of them"
        )
    if not wheels:
        return {"build": None, "wheels": {}}
    faiss = _attempt(warnings, " and ".join(wheels), lambda: import_module("faiss"))
    build = None if faiss is None else "gpu" if hasattr(faiss, "StandardGpuResources") else "cpu"
    return {"build": build, "wheels": wheels}


def _devices(torch: Any, warnings: list[str]) -> list[str]:
    if torch is None:
        return []
    devices = [f"cpu ({counted(os.cpu_count() or 1, 'core')}, {counted(torch.get_num_threads(), 'thread')})"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(i)
            devices.append(f"cuda:{i} ({found.name}, {found.total_memory / 2**30:.0f} GiB)")
    elif shutil.which("nvidia-smi"):
        built = "is built for CPUs" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} finds no GPU"
        warnings.append(f"an NVIDIA driver is installed, but torch {torch.__version__} {built}")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _attention(torch: Any) -> dict[str, list[str]]:
    """By device the attention implementations that models can be pruned with."""
    if torch is None:
        return {}
    from codebook.pruning.engine.kernels import ATTENTION

    return {device: list(names) for device, names in ATTENTION.items() if device == "cpu" or torch.cuda.is_available()}


def _shipped_codebooks() -> list[str]:
    from codebook.store.known import folders

    return [folder.name for folder in folders()]


def _screen(report: dict[str, Any]) -> str:
    """The report as text."""
    packages = [f"{name} {version or 'missing'}" for name, version in report["packages"].items()]
    faiss = report["faiss"]
    build = {"cpu": ", built for CPUs", "gpu": ", built for GPUs", None: ", which does not load"}[faiss["build"]]
    wheels = ", ".join(f"{name} {version}" for name, version in faiss["wheels"].items())
    kernels = "; ".join(f"{device}: {', '.join(names)}" for device, names in (report["attention"] or {}).items())
    lines = [
        f"codebook    {report['codebook']} in {report['folder']}",
        f"python      {report['python']} on {report['platform']}",
        *_wrapped("packages", packages),
        f"faiss       {wheels + build if wheels else 'none: torch searches instead, with the same answers'}",
        f"devices     {', '.join(report['devices']) or 'none'}",
        f"attention   {kernels or 'none'}",
        f"codebooks   {', '.join(report['codebooks']) or 'none'}",
    ]
    for name, extra in report["extras"].items():
        missing = f"no ({'; '.join(extra['problems'])}): {extra['install']}"
        lines.append(f"extra       {name}: {'installed' if extra['installed'] else missing}")
    lines += [f"warning     {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def _wrapped(label: str, words: list[str]) -> list[str]:
    """A label and words in lines of five."""
    rows = [", ".join(words[i : i + 5]) for i in range(0, len(words), 5)] or ["not known"]
    return [f"{label if i == 0 else '':<11} {row}" for i, row in enumerate(rows)]
