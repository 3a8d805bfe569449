"""A build on Ray is the local one; the driver's journal survives a kill like any other."""

import os
import signal
import sys

import pytest

from codebook.building import Pilot
from codebook.building.on_ray import ray_engine
from codebook.building.sources import open_images
from codebook.building.worker import Options, Worker
from codebook.errors import CodebookError
from tests.building.folders import ROOT, contents, run
from tests.building.tiny import model, processor, settings

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ["RAY_AUTH_MODE"] = "disabled"
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, runtime_env=environment)
    yield
    ray.shutdown()


def maker(pictures, marker=None):
    def make(settings):
        import torch

        torch.set_num_threads(1)
        if marker is not None and not marker.exists():
            marker.touch()

            class Dies(Worker):
                def __call__(self, name):
                    os.kill(os.getpid(), signal.SIGKILL)

            return Dies(model(), processor(), open_images(pictures), settings, Options())
        return Worker(model(), processor(), open_images(pictures), settings, Options())

    return make


def test_equals_the_local_build_though_worker_and_driver_are_stopped(tiny, pictures, tmp_path):
    def stop(state):
        if state.done == 6:
            raise KeyboardInterrupt

    out, states = tmp_path / "ray", []
    with pytest.raises(KeyboardInterrupt):  # a worker was killed by then, and another has its image
        run(tiny, pictures, out, engine=ray_engine(maker(pictures, tmp_path / "died"), 2), progress=stop)
    assert (tmp_path / "died").exists()
    run(tiny, pictures, out, progress=states.append)  # to the end without Ray
    run(tiny, pictures, tmp_path / "local")
    assert [s.done for s in states] == [6, 7, 8, 8] and contents(out) == contents(tmp_path / "local")


def test_a_pilot_on_ray_finds_what_it_finds_locally(tiny, pictures, tmp_path):
    asked = {"settings": settings(tau_p=None, tau_j=None), "pilot": Pilot(2, 0.4)}
    run(tiny, pictures, tmp_path / "ray", engine=ray_engine(maker(pictures), 2), **asked)
    run(tiny, pictures, tmp_path / "local", **asked)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_error_on_a_worker_is_one_line(tiny, pictures, tmp_path):
    def make(settings):
        raise CodebookError("no such model")

    with pytest.raises(CodebookError, match="run again, finished images are kept") as caught:
        run(tiny, pictures, tmp_path / "out", engine=ray_engine(make, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nowhere:port"])
def test_no_cluster_there(address):
    with pytest.raises(CodebookError, match=f"no Ray cluster at {address}.*check --address"):
        ray_engine(lambda: None, 2, address)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CodebookError, match=r"pip install 'redundancy-codebook\[ray\]'"):
        ray_engine(lambda: None, 2)


def test_command_line_refuses_an_unknown_engine(refused, tmp_path):
    command = "build", "miniature", "--images", tmp_path, "--out", tmp_path / "o"
    refused(*command, "--engine", "spark", words=["no engine 'spark': use local, ray"])
