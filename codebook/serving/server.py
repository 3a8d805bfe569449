"""The server: uvicorn, which on SIGTERM answers what it has accepted and then ends, and on SIGHUP reads anew."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from codebook.errors import CodebookError
from codebook.serving.app import build_app
from codebook.serving.protocol import LimitedProtocol
from codebook.serving.state import State


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address; port 0 takes a free one.

    Raises
    ------
    CodebookError
        If the address is not one of this machine, or is taken.
    """
    try:
        [family, *_, found] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(found[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name is empty or too long
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        raise CodebookError(
            f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port"
        ) from None


def address(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(bound: socket.socket) -> bool:
    """Whether a bound socket can be reached from this machine alone."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


class Server(uvicorn.Server):
    """uvicorn's server with our way to end.

    Parameters
    ----------
    ready
        Called when requests are taken.
    say
        Called with what whoever runs the service should read.
    """

    def __init__(
        self, state: State, ready: Callable[[], None] = lambda: None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self._state, self._ready, self._say = state, ready, say
        self._reloading: set[asyncio.Task[None]] = set()
        self.cut = 0
        protocol: Any = functools.partial(LimitedProtocol, seconds=state.limits.upload_seconds)
        config = uvicorn.Config(
            build_app(state), http=protocol, ws="none", lifespan="off", log_level="error", access_log=False,
            server_header=False, timeout_graceful_shutdown=state.limits.upload_seconds,
        )  # fmt: skip
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on SIGTERM and SIGINT; a second one ends at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, other threads
                loop.add_signal_handler(number, self._told_to_end)
        if hasattr(signal, "SIGHUP"):  # not on Windows
            with contextlib.suppress(RuntimeError, ValueError):
                loop.add_signal_handler(signal.SIGHUP, self._told_to_reload)
        yield

    def _told_to_reload(self) -> None:
        task = asyncio.ensure_future(self.reload())
        self._reloading.add(task)  # the loop itself would let it go
        task.add_done_callback(self._reloading.discard)

    async def reload(self) -> None:
        """Read the codebooks again, beside the requests that go on; if one cannot be read, all stay as they were."""
        shelf = self._state.shelf
        try:
            await asyncio.to_thread(shelf.reload)
        except Exception as error:
            self._say(f"the codebooks stay as they were: {error}")
        else:
            self._say(f"codebooks read again: {shelf.names()}")

    def _told_to_end(self) -> None:
        if self._state.draining:
            self.should_exit = self.force_exit = True
            return
        self._state.draining = True
        self._draining = asyncio.ensure_future(self.drain())

    async def drain(self) -> None:
        """Refuse new requests, wait for the accepted ones, and end."""
        state = self._state
        state.draining = True
        try:
            async with asyncio.timeout(state.limits.drain_seconds):
                while state.active:
                    state.idle.clear()
                    await state.idle.wait()
        except TimeoutError:
            self.cut, self.force_exit = state.active, True
        self.should_exit = True
