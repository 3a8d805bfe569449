"""`codebook doctor`: it says what is there, and it survives whatever is missing."""

import importlib
import json
import re
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

REQUIRED = [
    "huggingface-hub", "jinja2", "numpy", "packaging", "pillow", "pydantic", "rich", "safetensors", "sqlitedict",
    "torch", "transformers", "typer",
]  # fmt: skip


@pytest.fixture
def doctor(run):
    """The report as data, and as the lines of a screen."""

    def call():
        code, out, _ = run("doctor", "--json")
        assert code == 0
        shown, text, _ = run("doctor")
        assert shown == 0
        return json.loads(out), text.splitlines()

    return call


@pytest.fixture
def distributions(monkeypatch):
    """Pretend that distributions are installed in these versions; None: not at all."""
    real = metadata.version

    def pretend(versions):
        def version(name):
            found = versions[name] if name in versions else real(name)
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(metadata, "version", version)

    return pretend


def test_versions_devices_and_extras_on_one_screen(doctor):
    report, lines = doctor()
    assert [name for name in report["packages"] if name != "torchvision"] == REQUIRED
    assert all(report["packages"][name] == metadata.version(name) for name in REQUIRED)
    assert any("cpu" in device for device in report["devices"]) and report["attention"]["cpu"] == ["sdpa", "eager"]
    assert report["codebooks"] == ["eyes", "miniature"] and set(report["extras"]) == {
        "cpu", "datasets", "gpu", "miniature", "plot", "ray", "serve", "video",
    }  # fmt: skip
    assert report["extras"]["plot"]["installed"] and len(lines) <= 24
    assert any(f"torch {torch.__version__}" in line for line in lines)


def test_extras_that_are_missing_come_with_the_command(doctor, distributions):
    distributions({"matplotlib": None, "ray": "1.0", "faiss-cpu": "1.15.1", "faiss-gpu": None})
    extras = doctor()[0]["extras"]
    assert extras["plot"] == {
        "installed": False,
        "problems": ["matplotlib is missing"],
        "install": "pip install 'redundancy-codebook[plot]'",
    }
    [problem] = extras["ray"]["problems"]
    assert "ray is 1.0" in problem and "<2.64" in problem
    assert extras["cpu"]["installed"]
    assert extras["gpu"]["install"] == "pip uninstall faiss-cpu; pip install 'redundancy-codebook[gpu]'"


def test_two_faiss_wheels_are_warned_about(doctor, distributions):
    distributions({"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"})
    report, _ = doctor()
    [warning] = [warning for warning in report["warnings"] if "faiss" in warning]
    assert warning.startswith("faiss-cpu and faiss-gpu overwrite each other: pip uninstall faiss-cpu faiss-gpu")
    assert report["faiss"]["wheels"] == {"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"}


def test_without_faiss_or_with_one_that_does_not_load(doctor, distributions, monkeypatch):
    distributions({"faiss-cpu": "1.15.1", "faiss-gpu": None})
    monkeypatch.setitem(sys.modules, "faiss", None)
    report, lines = doctor()
    assert report["faiss"]["build"] is None and any(w.startswith("faiss-cpu does not load") for w in report["warnings"])
    assert any("faiss-cpu 1.15.1, which does not load" in line for line in lines)
    distributions({"faiss-cpu": None, "faiss-gpu": None})
    report, lines = doctor()
    assert report["faiss"] == {"build": None, "wheels": {}} and any("torch searches instead" in line for line in lines)


def test_the_faiss_build_is_told_by_what_it_can_do(doctor, distributions, monkeypatch):
    distributions({"faiss-cpu": None, "faiss-gpu": "1.15.1"})
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(StandardGpuResources=object))
    assert doctor()[0]["faiss"] == {"build": "gpu", "wheels": {"faiss-gpu": "1.15.1"}}


def test_torchvision(doctor, distributions, monkeypatch):
    distributions({"torchvision": None})
    report, lines = doctor()
    assert any(w.startswith("torchvision is missing") for w in report["warnings"])
    assert any("torchvision missing" in line for line in lines)
    distributions({"torchvision": "0.28.0"})
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as a build for CUDA beside a torch for CPUs
    assert any(w.startswith("torchvision 0.28.0 does not load") for w in doctor()[0]["warnings"])


def test_graphics_cards(doctor, monkeypatch):
    card = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    report, _ = doctor()
    assert report["devices"][1:3] == ["cuda:0 (NVIDIA H100, 80 GiB)", "cuda:1 (NVIDIA H100, 80 GiB)"]
    assert "flex_attention" in report["attention"]["cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert any("an NVIDIA driver is installed" in warning for warning in doctor()[0]["warnings"])


@pytest.mark.parametrize("name", REQUIRED)
def test_a_required_package_that_is_missing(doctor, distributions, monkeypatch, name):
    distributions({name: None})
    report, lines = doctor()
    assert report["packages"][name] is None
    assert any(warning.startswith(f"{name} is missing: pip install '{name}") for warning in report["warnings"])
    assert any(f"{name} missing" in line for line in lines)


@pytest.mark.parametrize("error", [ImportError("no libcudart.so"), OSError("wrong ELF class"), RuntimeError("\n\nodd")])
def test_a_required_package_that_is_broken(doctor, monkeypatch, error):
    real = importlib.import_module

    def broken(name):
        if name == "torch":
            raise error
        return real(name)

    monkeypatch.setattr("codebook.cli.doctor.import_module", broken)
    report, _ = doctor()
    words = " ".join(str(error).split())
    assert any(w.startswith(f"torch {torch.__version__} does not load") and words in w for w in report["warnings"])
    assert report["devices"] == [] and report["attention"] == {}


def test_an_old_package_and_no_metadata(doctor, distributions, monkeypatch):
    distributions({"transformers": "4.57.0"})
    assert any("transformers is 4.57.0, not" in warning for warning in doctor()[0]["warnings"])

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    report, _ = doctor()
    assert report["extras"] == {} and any("install it by pip" in warning for warning in report["warnings"])


def test_without_packaging(doctor, monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    report, _ = doctor()
    assert report["extras"] == {} and any("requirements are not known" in warning for warning in report["warnings"])


def test_with_nothing_but_what_prints():
    """In a process of its own in which all packages fail to load but those of the command line."""
    code = """
import sys
for name in "torch transformers numpy PIL safetensors huggingface_hub sqlitedict jinja2 faiss".split():
    sys.modules[name] = None
from codebook.cli import main
main(["doctor"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for name in ("torch", "transformers", "numpy", "pillow", "safetensors", "huggingface-hub", "sqlitedict", "jinja2"):
        assert re.search(rf"warning +{name} .*does not load", done.stdout), done.stdout
