"""Probing images with Ray Data: actors that hold the model, while the driver keeps the journal."""

from __future__ import annotations

import math
import pickle
import socket
from collections.abc import Callable, Iterator
from typing import Any

from codebook.building.presets import Settings
from codebook.building.worker import Engine, ImageTask, Outcome, Worker
from codebook.errors import CodebookError, install_command, one_line

PATIENCE = 5.0
"""Seconds to wait for a cluster's address to answer."""
RETRIES = 3
"""How often images go to another actor when the one that had them dies."""
IMAGES_PER_BLOCK = 4
"""Images per message to an actor and back."""


def check_cluster(address: str | None) -> None:
    """Refuse the address of a cluster at which nothing answers: Ray itself would try for many minutes.

    Raises
    ------
    CodebookError
        If nothing answers there.
    """
    if address is None or ":" not in address:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except (OSError, ValueError) as error:
        raise CodebookError(f"no Ray cluster at {address}: {error}; check --address") from None


def join_cluster(ray: Any, address: str | None) -> None:
    """Connect this process to a cluster, or to one of its own that is started for it.

    Raises
    ------
    CodebookError
        If it cannot be reached.
    """
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise CodebookError(f"cannot reach Ray: {one_line(error)}; check --address") from None


def ray_engine(make: Callable[[Settings], Worker], workers: int, address: str | None = None, gpus: float = 0) -> Engine:
    """An engine for `build` that probes images on Ray actors, fed by Ray Data.

    The driver writes the journal as outcomes come in, so a run that was killed continues, on Ray or not, and ends with
    the codebook that one process makes. A dead actor is started again, and the images that it had are probed again.

    Parameters
    ----------
    make
        Makes a `Worker` with the build's settings, on the actor's machine: it must find the model and the images there.
    workers
        Actors; each holds the model.
    address
        Address of a running cluster, as in `ray.init`; by default one is started on this machine, for this build.
    gpus
        GPUs per actor.

    Raises
    ------
    CodebookError
        If Ray is not installed or cannot be reached.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise CodebookError(f"ray is not installed: `{install_command('ray')}`, or leave --engine out") from None

    check_cluster(address)

    class Probe:
        def __init__(self, task: ImageTask) -> None:
            self.worker = make(task.settings)
            self.worker.task = task

        def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
            try:
                return {"outcome": pickle.dumps(self.worker(row["item"]))}
            except CodebookError as error:
                return {"outcome": pickle.dumps(str(error))}

    def run(local: Worker, names: list[str]) -> Iterator[Outcome]:
        if not names:
            return
        ours = not ray.is_initialized()
        if ours:
            join_cluster(ray, address)
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            images = ray.data.from_items(names, override_num_blocks=math.ceil(len(names) / IMAGES_PER_BLOCK))
            probe: Any = Probe
            outcomes = images.map(
                probe, compute=ray.data.ActorPoolStrategy(size=min(workers, images.num_blocks())), num_gpus=gpus,
                fn_constructor_args=(local.task,), max_restarts=RETRIES, max_task_retries=RETRIES,
            )  # fmt: skip
            for row in outcomes.iter_rows():
                outcome = pickle.loads(row["outcome"])  # of our own actors; Ray's messages are pickled as well
                if isinstance(outcome, str):
                    raise CodebookError(outcome)
                yield outcome
        except ray.exceptions.RayError as error:
            raise CodebookError(
                f"a worker on Ray failed: {one_line(error)}; run again, finished images are kept"
            ) from None
        finally:
            if ours:
                ray.shutdown()

    return run
