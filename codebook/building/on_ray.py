"""Probing images on a Ray cluster: actors that hold the model, while the driver keeps the journal."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

from codebook.building.builder import Engine, Outcome, Worker
from codebook.errors import CodebookError

PATIENCE = 5.0
"""Seconds to wait for a cluster's address to answer."""
RETRIES = 3
"""Times that an image goes to another actor when the one that had it dies."""


def ray_engine(make: Callable[[], Worker], workers: int, address: str | None = None, gpus: float = 0) -> Engine:
    """An engine for `build` that probes images on Ray actors.

    The driver writes the journal as outcomes come in, so a run that was killed continues, on Ray or not, and ends with
    the codebook that one process makes. A dead actor is started again, and the images that it had are probed again.

    Parameters
    ----------
    make
        Makes a `Worker`, on the actor's machine: it must find the model and the images there.
    workers
        Actors; each holds the model.
    address
        Of a running cluster, as in `ray.init`; by default one is started on this machine, for this build.
    gpus
        That each actor takes.

    Raises
    ------
    CodebookError
        If Ray is not installed or cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise CodebookError("ray is not installed: `pip install codebook[ray]`, or leave --engine out") from None

    if address is not None and ":" in address:  # Ray itself tries for many minutes
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        except (OSError, ValueError) as error:
            raise CodebookError(f"no Ray cluster at {address}: {error}; check --address") from None

    class Actor:
        def __init__(self) -> None:
            self.worker = make()

        def probe(self, name: str) -> Outcome | str:
            try:
                return self.worker(name)
            except CodebookError as error:
                return str(error)

    def run(local: Worker, names: list[str]) -> Iterator[Outcome]:
        if not names:
            return
        ours = not ray.is_initialized()
        if ours:
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise CodebookError(f"cannot reach Ray: {reason}; check --address") from None
        actors: list[Any] = []
        try:
            remote: Any = ray.remote(Actor)
            count = min(workers, len(names))
            held = remote.options(num_gpus=gpus, max_restarts=RETRIES, max_task_retries=RETRIES)
            actors += [held.remote() for _ in range(count)]
            waiting = iter(names)
            running = {actor.probe.remote(name): actor for actor, name in zip(actors, waiting, strict=False)}
            while running:
                [ready], _ = ray.wait(list(running))
                actor = running.pop(ready)
                if (name := next(waiting, None)) is not None:
                    running[actor.probe.remote(name)] = actor
                try:
                    outcome = ray.get(ready)
                except ray.exceptions.RayError as error:
                    reason = " ".join(str(error).split())[:200]
                    raise CodebookError(
                        f"a worker on Ray failed: {reason}; run again, finished images are kept"
                    ) from None
                if isinstance(outcome, str):
                    raise CodebookError(outcome)
                yield outcome
        finally:
            for actor in actors:
                ray.kill(actor)
            if ours:
                ray.shutdown()

    return run
