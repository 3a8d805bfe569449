"""A service in a thread of this process, asked over a real socket, and requests for it."""

import asyncio
import threading
import time

from codebook.serving.limits import Limits
from codebook.serving.metrics import Metrics
from codebook.serving.model_thread import ModelThread
from codebook.serving.server import Server, address, listen
from codebook.serving.state import ModelState


class Running:
    """A running service: its URL, its state, and `stop`."""

    def __init__(self, state):
        self.state = state
        bound, started = listen("127.0.0.1", 0), threading.Event()
        self.url, self.server = address(bound), Server(state, started.set)
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([bound])), daemon=True)
        self._thread.start()
        assert started.wait(30)

    def stop(self):
        self.server.should_exit = True
        self._thread.join(30)


class Service(Running):
    """A running service of a model."""

    def __init__(self, model, processor, schedule, limits=None, **options):
        metrics = Metrics()
        metrics.describe(schedule, 0.2)
        thread = ModelThread(model, processor, schedule, metrics)
        super().__init__(ModelState(
            name="miniature", model=model, processor=processor, schedule=schedule, model_thread=thread, metrics=metrics,
            limits=limits or Limits(), **options,
        ))  # fmt: skip

    def stop(self):
        super().stop()
        self.state.model_thread.stop()


def wait(condition, seconds=30):
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
