"""The service on Ray Serve: replicas on one machine or many, each with the whole app and a model of its own."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from codebook.building.on_ray import check_cluster, join_cluster
from codebook.errors import CodebookError, install_command, printable
from codebook.serving.blueprint import Blueprint

APPLICATION = "codebook"
"""Name of the application among others on the cluster."""
NEEDED_BY_RAY = ("ray", "aiohttp", "grpc", "watchfiles")
"""Packages of `ray[serve]`, some of which plain Ray lacks."""


def check_ray() -> None:
    """Refuse to begin without Ray Serve."""
    if missing := [name for name in NEEDED_BY_RAY if find_spec(name) is None]:
        raise CodebookError(
            f"serving on Ray needs {', '.join(missing)}: run `{install_command('ray', 'serve')}`, or leave --engine out"
        )


def serve_on_ray(
    blueprint: Blueprint, replicas: int, host: str, port: int, address: str | None, gpus: int, ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT: then new requests are refused, and what is accepted is answered.

    Parameters
    ----------
    blueprint
        Every replica makes a service of it, on its own machine: it must find the model and the codebooks there.
    replicas
        How many; one that dies is started again.
    address
        Address of a running cluster, as in `ray.init`; None: one is started on this machine, for this service.
    gpus
        GPUs per replica.
    ready
        Called when requests are taken.

    Raises
    ------
    CodebookError
        If the cluster cannot be reached, has too few cores or GPUs, or a replica cannot be made.
    """
    check_cluster(address)
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    join_cluster(ray, address)
    try:
        _check_room(ray.cluster_resources(), replicas, gpus)
        serve.start(http_options={"host": host, "port": port})
        serve.run(_application(serve, blueprint, replicas, gpus), name=APPLICATION, route_prefix="/")
        ready()
        _wait_for_signal()
        serve.delete(APPLICATION)  # its proxies go on until every replica has answered what it had
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise CodebookError(f"the service failed on Ray: {_cause(serve, error)}") from None
    finally:
        ray.shutdown()  # Serve itself stays on a cluster that was there before: others may use it


def _check_room(resources: dict[str, float], replicas: int, gpus: int) -> None:
    """Refuse replicas that would wait for ever: each has a core, and its GPUs, for itself."""
    for kind, each in (("CPU", 1), ("GPU", gpus)):
        there = int(resources.get(kind, 0))
        if replicas * each > there:
            raise CodebookError(f"{replicas} replicas need {replicas * each} {kind}s and the cluster has {there}: "
                                "start fewer, or add machines to it")  # fmt: skip


def _cause(serve: Any, error: Exception) -> str:
    """What a replica said of why it cannot be made; else what Ray says."""
    application = serve.status().applications.get(APPLICATION)
    texts = [found.message for found in application.deployments.values()] if application else []
    lines = [line.strip() for text in (*texts, str(error)) for line in text.splitlines() if line.strip()]
    own = [line for line in lines if "CodebookError: " in line]
    return printable(own[-1].partition("CodebookError: ")[2] if own else lines[-1], 400)


def _application(serve: Any, blueprint: Blueprint, replicas: int, gpus: int) -> Any:
    def app() -> Any:  # called in each replica
        from codebook.serving.app import build_app

        return build_app(blueprint.make())

    limits = blueprint.shared["limits"]
    deployment = serve.deployment(
        name="Service",
        num_replicas=replicas,
        max_ongoing_requests=2 * limits.queue,  # more than the service itself accepts, whose errors say more
        graceful_shutdown_timeout_s=limits.drain_seconds,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
    )
    return deployment(serve.ingress(app)()).bind()


def _wait_for_signal() -> None:
    """Wait for SIGTERM or SIGINT; a second one ends the process at once."""
    told = threading.Event()

    def end(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    while not told.wait(3600):
        pass
