"""The service on Ray, as far as it shows without a cluster; `python -m benchmarks.faults.serve_ray` has one."""

import pickle

import pytest

from codebook.errors import CodebookError
from codebook.pruning.plan import Plan
from codebook.serving import on_ray
from codebook.serving.blueprint import Blueprint
from codebook.serving.limits import Limits
from codebook.serving.state import ModelState


def test_options_that_need_the_engine(refused):
    refused("serve", "miniature", "--replicas", 2, words=["--replicas and --address are Ray's", "--engine ray"])
    refused("serve", "miniature", "--engine", "spark", words=["no engine 'spark'", "transformers, ray or vllm"])


def test_ray_that_is_not_there_is_named(refused, monkeypatch):
    monkeypatch.setattr(on_ray, "find_spec", lambda name: None if name == "aiohttp" else name)
    refused("serve", "miniature", "--engine", "ray", words=["needs aiohttp", "'redundancy-codebook[ray,serve]'"])


def test_a_cluster_that_is_not_there_is_not_waited_for():
    with pytest.raises(CodebookError, match=r"no Ray cluster at 127\.0\.0\.1:1: .*check --address"):
        on_ray.serve_on_ray(Blueprint(), 1, "127.0.0.1", 0, "127.0.0.1:1", 0, ready=pytest.fail)


def test_replicas_that_would_wait_for_ever():
    on_ray._check_room({"CPU": 4.0, "GPU": 2.0}, 2, 1)
    with pytest.raises(CodebookError, match="5 replicas need 5 CPUs and the cluster has 4"):
        on_ray._check_room({"CPU": 4.0}, 5, 0)
    with pytest.raises(CodebookError, match="2 replicas need 2 GPUs and the cluster has 0"):
        on_ray._check_room({"CPU": 4.0}, 2, 1)


def test_a_recipe_travels_and_makes_the_service():
    shared = {"limits": Limits(queue=7), "api_key": "secret"}
    blueprint = Blueprint(model="miniature", plan=Plan("divprune", 0.3), loading={"device": "cpu"}, shared=shared)
    state = pickle.loads(pickle.dumps(blueprint)).make()
    try:
        assert isinstance(state, ModelState) and state.name == "miniature"
        assert str(state.schedule).startswith("divprune:") and state.schedule.budget(144, 12) == pytest.approx(
            0.3, abs=0.01
        )
        assert state.limits.queue == 7 and state.api_key == "secret" and not state.shelf.listing()
    finally:
        state.model_thread.stop()
