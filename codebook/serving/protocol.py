"""HTTP as uvicorn speaks it, with limits on connections that have not asked for anything yet."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from codebook.serving.errors import error_response

MOST_CONNECTIONS = 512
"""Connections at a time; a further one is closed at once."""


class LimitedProtocol(H11Protocol):
    """One connection: what trickles in is cut off, and what is no HTTP gets an error in the service's shape.

    Parameters
    ----------
    seconds
        Time for the head of a request to arrive; and for a client that lets an answer lie to read on.
    """

    def __init__(self, *args: Any, seconds: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self.resume_writing()
        super().connection_lost(exc)
        self._unwatch()

    def pause_writing(self) -> None:
        """Wait for a client that reads nothing for so long only: it holds a place in the queue."""
        super().pause_writing()
        self._wait_for_reader(None)

    def _wait_for_reader(self, before: int | None) -> None:
        left = self.transport.get_write_buffer_size()  # bytes; meanwhile nothing is added
        if before is not None and left >= before:
            self.transport.abort()
        else:
            self._stalled = self.loop.call_later(self._seconds, self._wait_for_reader, left)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unwatch()

    def _watch(self) -> None:
        """Wait for the rest of a head, or of a body that was refused, for so long only."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._seconds, self.transport.close)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send_400_response(self, msg: str) -> None:
        body = bytes(error_response(400, msg).body)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
