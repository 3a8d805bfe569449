"""Notes and progress go through the logger `codebook`, and `--quiet` leaves results and errors only."""

import logging
import os
import sys

import pytest
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging as transformers_logging

from codebook import miniature
from codebook.cli import COMMANDS
from codebook.cli.output import note, progress, quiet
from codebook.models.loading import SHIPPED_MODELS
from tests.hub import Hub, Repository, serving


@pytest.fixture
def bars(monkeypatch):
    """The libraries' progress bars as in a new process on a terminal."""
    monkeypatch.setenv("TQDM_POSITION", "-1")  # the hub's client draws also where there is no terminal
    enable_progress_bars()
    transformers_logging.enable_progress_bar()


def test_every_command_has_it(run):
    for name in COMMANDS:
        assert "--quiet" in run(name, "--help")[1], name


@pytest.fixture
def tokens(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.rand(10, 160)}, tmp_path / "tokens.safetensors")
    return ["prune", "--tokens", tmp_path / "tokens.safetensors", "--codebook", "miniature", "--keep", "0.2"]


def test_quiet_leaves_the_result(run, refused, tmp_path):
    images = ["miniature", "images", "--out", tmp_path / "scenes", "--count", "2"]
    code, out, err = run(*images, "--quiet")
    assert code == 0 and not err and "scenes" in out
    refused(*images, "--count", "0", "--quiet", words=["--count"])


def test_progress_and_notes_are_logged(run, capfd, monkeypatch):
    run("list")  # sets the logger up
    note("100% of it")
    with progress("work", 2, "parts") as tick:
        tick(2)
    assert capfd.readouterr().err.splitlines()[0] == "100% of it"
    monkeypatch.setattr(logging.getLogger("codebook"), "level", logging.ERROR)
    logging.getLogger("codebook.cli").manager._clear_cache()
    assert quiet()
    note("silent")
    with progress("work", 2, "parts") as tick:
        tick(2)
    assert not capfd.readouterr().err
    logging.getLogger("codebook.cli").manager._clear_cache()


def test_a_script_that_sets_no_level_sees_progress(capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger("codebook"), "level", logging.NOTSET)
    with progress("work", 2, "parts") as tick:
        tick(2)
    assert capfd.readouterr().err == "work: 2/2\n"  # of a speed nothing is known yet


def test_progress_says_how_fast_it_is_once_that_is_known(capfd, monkeypatch):
    now = iter([0.0, 100.0, 100.0, 102.0, 102.0])
    monkeypatch.setattr("codebook.cli.output.time.monotonic", lambda: next(now))
    with progress("work", 9, "parts") as tick:  # at 0 s
        tick(1, "begun")  # of an earlier run, at 100 s
        tick(9)  # eight more within 102 s
    assert capfd.readouterr().err == "work: 1/9; begun\nwork: 9/9, 0.1 parts/s\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_work_that_is_no_unit_does_not_slow_the_speed(capfd, monkeypatch):
    now = iter([0.0, 1.0, 2.0, 3.0, 50.0, 51.0, 52.0])
    monkeypatch.setattr("codebook.cli.output.time.monotonic", lambda: next(now))
    with progress("work", 4, "parts") as tick:  # at 0 s
        tick(0)  # seen at 1 s
        tick(4)  # at 3 s
        tick(4, "memory")  # at 51 s
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["work: 4/4, 1.3 parts/s", "work: 4/4, 1.3 parts/s; memory"]


def test_work_goes_on_where_its_progress_cannot_be_written(monkeypatch):
    """As where a log is on a full disk, or the reader of a pipe has left."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        with progress("work", 2, "parts") as tick:
            tick(1)
            tick(2)


def test_a_model_of_the_hub_is_fetched_without_a_word(run, bars):
    files = {file.name: file.read_bytes() for file in SHIPPED_MODELS["miniature"].iterdir() if file.suffix == ".json"}
    hub = Hub({name: Repository() for name in ("owner/loud", "owner/quiet")})
    for repository in hub.repositories.values():
        repository.commit(files)
    with serving(hub):
        code, out, err = run("vllm-args", "owner/loud", "--method", "uniform")
        assert code == 0 and "config.json: 100%" in err
        silent = run("vllm-args", "owner/quiet", "--method", "uniform", "--quiet")
    assert silent == (0, out.replace("loud", "quiet"), "")


def test_bars_that_the_environment_asks_for_are_left_without_a_warning(run, recwarn, monkeypatch, tmp_path):
    """With HF_HUB_DISABLE_PROGRESS_BARS=0 the hub's client warns of who hides its bars."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", False)
    monkeypatch.setattr(sys.modules[enable_progress_bars.__module__], "HF_HUB_DISABLE_PROGRESS_BARS", False)
    [picture] = miniature.write_images(tmp_path, 1)
    asked = ["--image", picture, "--ask", "read the number.", "--method", "uniform"]
    assert run("prune", "miniature", *asked, "--quiet")[0] == 0
    assert not [str(warning.message) for warning in recwarn if "progress bars" in str(warning.message)]


def test_a_model_of_the_users_is_loaded_without_a_word(run, bars, tmp_path):
    """By its folder: transformers draws a bar for models that do not ship with the package."""
    [picture] = miniature.write_images(tmp_path, 1)
    asked = ["prune", SHIPPED_MODELS["miniature"], "--image", picture, "--ask", "read the number."]
    asked += ["--method", "uniform", "--keep", "0.5"]
    assert "Loading weights" in run(*asked)[2]
    code, out, err = run(*asked, "--quiet")
    assert (code, err) == (0, "") and out
