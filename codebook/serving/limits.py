"""Limits of the service, and the middleware that every request passes first."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codebook.errors import CodebookError, quoted
from codebook.serving.errors import ServiceError, error_response

if TYPE_CHECKING:
    from codebook.serving.state import State

LIVENESS = {"/health", "/ready"}
"""Paths that tell whether the service lives."""
KEYLESS = LIVENESS | {"/"}
"""Paths that need no API key; the page asks its reader for it."""
ANSWERED_WHILE_DRAINING = LIVENESS | {"/metrics"}


@dataclass(frozen=True)
class Limits:
    """What a client may ask for; what is beyond is refused by name.

    Attributes
    ----------
    body
        Bytes of a request.
    images, pixels
        Pictures of a request, and their pixels together.
    queue
        Requests that are accepted and not yet answered.
    new_tokens
        Tokens of an answer.
    seconds
        From the acceptance of a request to the end of its answer.
    upload_seconds
        To send a request.
    drain_seconds
        To answer what is accepted when the service is told to end.
    """

    body: int = 20 * 2**20
    images: int = 16
    pixels: int = 2**26
    queue: int = 64
    new_tokens: int = 1024
    seconds: int = 120
    upload_seconds: int = 20
    drain_seconds: int = 60


def read_limits(changes: list[str]) -> Limits:
    """The default limits with changes such as `queue=128`.

    Raises
    ------
    CodebookError
        If a change has no known name, or no positive integer.
    """
    names = [field.name for field in fields(Limits)]
    values = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in names:
            raise CodebookError(f"no limit {quoted(name)}: give NAME=VALUE, the names are {', '.join(names)}")
        if not (value.isascii() and value.isdigit() and 0 < int(value[:20]) < 2**40):
            raise CodebookError(f"the limit {name} must be a positive integer, not {quoted(value)}")
        values[name] = int(value)
    return replace(Limits(), **values)


class Guard:
    """ASGI middleware: the API key, draining, the queue, the size of the body and the time to send it; and counting.

    The body is read here, whole and within its limits, before anything else sees the request.
    """

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # what nginx writes down of a client that left

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, noting)
        finally:
            endpoint = getattr(scope.get("route"), "path", "other")
            self.state.metrics.requests.labels(endpoint, str(status)).inc()
            self.state.metrics.request_seconds.labels(endpoint).observe(time.monotonic() - start)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self.state
        try:
            self._check(scope)
        except ServiceError as error:
            await error_response(error.status, str(error), error.code)(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        state.active += 1
        try:
            try:
                body = await self._read(scope, receive)
            except ServiceError as error:
                await error_response(error.status, str(error), error.code)(scope, receive, send)
                return
            if body is not None:
                await self.app(scope, _replayed(body, receive), send)
        finally:
            state.active -= 1
            if not state.active:
                state.idle.set()

    def _check(self, scope: Scope) -> None:
        state, path = self.state, scope["path"]
        if state.api_key is not None and path not in KEYLESS:
            given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
            if not secrets.compare_digest(given, state.api_key.encode()):
                raise ServiceError(401, "no API key, or another one: send it as `Authorization: Bearer KEY`")
        if state.draining and path not in ANSWERED_WHILE_DRAINING:
            raise ServiceError(503, "the service is about to end: ask another one", "draining")
        if scope["method"] == "POST" and state.active >= state.limits.queue:
            raise ServiceError(429, f"{state.active} requests are waiting: try again later", "queue_full")

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body of a request; None if the client left."""
        limits, headers = self.state.limits, dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        too_large = ServiceError(413, f"the request has more than {limits.body:,} bytes: send less", "too_large")
        if not declared.isdigit() or int(declared[:20]) > limits.body:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.upload_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limits.body:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ServiceError(
                408, f"the request did not arrive within {limits.upload_seconds} s: send it faster", "too_slow"
            ) from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read before, and then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
